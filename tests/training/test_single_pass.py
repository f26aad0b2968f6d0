"""The regulariser's gradient from one backward pass against the same from two, in float64."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from toys.jobs import Job, run, save_models, train
from toys.models import VOCAB, answer_model, bare_trainer, batch, equal, loader, part, weights
from toys.single_pass import (
    WEIGHT,
    Hidden,
    LogisticLoss,
    Logits,
    Looks,
    Other,
    Scaled,
    Spy,
    Subset,
    difference,
    gradients,
    hooks,
)

from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.objectives import objectives
from lightning_ssiuu.regularizers import AttributionRegularizer, Combined, DualMask, Regularizer
from lightning_ssiuu.training.checkpoints import check_states
from lightning_ssiuu.training.layer_gradients import LAYERS
from lightning_ssiuu.training.single_pass import obstacle
from lightning_ssiuu.utils.errors import UserError


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"accumulate": 3, "target": "length_normalised", "gradient_checkpointing": True},
        {"accumulate": 2, "tie_word_embeddings": False},
        {"tie_word_embeddings": False, "gradient_checkpointing": True, "target": "length_normalised"},
        {"objective": "GradientAscent", "modules": ["mlp_up", "layer1.attn_q"]},
        {"objective": "SimNPO", "accumulate": 2},
        {"reduction": "token", "accumulate": 2},
        {"objective": LogisticLoss},
        {"name": "gpt2", "gradient_checkpointing": True},
        {"name": "gpt2", "accumulate": 3, "target": "length_normalised"},
        {"name": "gpt_neox"},
        {"name": "qwen3"},
        {"name": "olmo2"},
        *({"name": name} for name in ("phi3", "starcoder2", "falcon", "falcon_mq", "gptj")),
    ],
    ids=str,
)
def test_one_pass_gives_what_two_give(case: dict[str, Any]) -> None:
    shape = {key: case[key] for key in ("name", "tie_word_embeddings") if key in case}
    options = {key: value for key, value in case.items() if key not in shape}
    results = [gradients(answer_model(**shape), passes, **options) for passes in ("one", "two")]
    assert difference(results[0][0], results[1][0]) < 1e-12
    assert all(g.count_nonzero() for g in results[0][0][0])


def test_gemma(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", lambda tensor: tensor)  # its norms compute in float32 otherwise
    config = transformers.GemmaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        initializer_range=0.15,
        pad_token_id=1,
    )
    results = []
    for passes in ("one", "two"):
        torch.manual_seed(0)
        hf = transformers.AutoModelForCausalLM.from_config(config).double()
        assert type(hf.model.norm).__name__ == "GemmaRMSNorm"
        results.append(gradients(AnswerModel(hf), passes)[0])
    assert difference(*results) < 1e-12


def test_adapters() -> None:
    results = []
    for passes in ("one", "two"):
        model = answer_model()
        torch.manual_seed(0)
        LoRA(r=2, dropout=0.2).attach(model.hf)
        results.append(gradients(model, passes, steps=3)[0])
    assert difference(results[0][1:], results[1][1:]) < 1e-12  # at the start A's gradient is 0


@pytest.mark.parametrize("frozen", ["embed_tokens", "layers.0", "norm"])
def test_frozen_weights(frozen: str) -> None:
    results = []
    for passes in ("one", "two"):
        model = answer_model(tie_word_embeddings=False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)
        results.append(gradients(model, passes, gradient_checkpointing=True)[0])
    assert difference(*results) < 1e-12


def test_the_objective_s_own_gradient_is_unchanged_to_the_bit() -> None:
    results = []
    for passes in ("one", "two"):
        model = answer_model("gpt2", dtype=torch.float32)
        results.append(gradients(model, passes, steps=1)[1])  # the first step has no penalty
    assert equal(*results)


def test_the_padding_token_in_a_question_counts_as_in_two_passes() -> None:
    some = [{**batch(n)} for n in range(2)]
    for one in some:
        one["forget"]["input_ids"][:, 1] = 1  # the embedding's padding row, which gets no gradient
    results = [
        gradients(answer_model(tie_word_embeddings=tied), passes, batches=some)[0]
        for tied in (True, False)
        for passes in ("one", "two")
    ]
    assert difference(*results[:2]) < 1e-12
    assert difference(*results[2:]) < 1e-12


def test_with_another_regulariser_that_differentiates_the_same_answers() -> None:
    results = []
    for passes in ("one", "two"):
        spy, model = Spy(WEIGHT, passes=passes), answer_model()
        module = objectives()["GradientDifference"](regularizer=Combined([spy, DualMask(alpha=0.0, beta=1.0), Looks()]))
        module.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.02)
        module.adopt(model.train(), None)
        bare_trainer(2).fit(module, loader([batch(0), batch(1)]))
        results.append(spy.seen)
    assert difference(*results) < 1e-12


def test_a_layer_whose_output_a_hook_changes() -> None:
    results = []
    for passes in ("one", "two"):
        model = answer_model()
        model.hf.model.layers[0].mlp.up_proj.register_forward_hook(lambda _, __, output: 3 * output)
        results.append(gradients(model, passes)[0])
    assert difference(*results) < 1e-12


def test_a_run_repeats_to_the_bit() -> None:
    runs = [gradients(answer_model("gpt2", dtype=torch.float32), "one", accumulate=2)[1] for _ in range(2)]
    assert equal(*runs)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_under_autocast_it_is_as_close_as_rounding_allows(name: str) -> None:
    some, results = batch(0), []
    for passes in ("one", "two"):
        spy, model = Spy(WEIGHT, passes=passes), answer_model(name, dtype=torch.float32)
        module = objectives()["GradientAscent"](regularizer=spy)
        module.log_dict = lambda *_, **__: None
        module.adopt(model.train(), None)
        with torch.autocast("cpu", torch.bfloat16):
            loss = module.training_step(some, 0)
        loss.backward()
        spy.apply(model)
        results.append(torch.cat([g.flatten() for g in spy.seen[0]]))
    assert results[0].dtype == torch.float32
    assert (results[0] - results[1]).norm() < 0.02 * results[1].norm()


def test_two_ranks(tmp_path: Path) -> None:
    save_models(tmp_path)
    penalty = {"weight": WEIGHT, "target": "length_normalised"}
    jobs = {
        (passes, n): Job(f"{passes} {n}", "ddp", regularizer=penalty | {"passes": passes}, trainer=_accumulated(n))
        for passes, n in (("one", 1), ("one", 3), ("two", 1))
    }
    on_two = run(2, list(jobs.values()), tmp_path)
    for (_, n), job in jobs.items():
        alone = train(Job("alone", regularizer=penalty | {"passes": "two"}, trainer=_accumulated(n)), 1, tmp_path)
        assert alone["figures"]["train/penalty_gradient_norm"] > 1e-4
        for result in on_two[job.key]:
            for a, b in zip(result["weights"], alone["weights"], strict=True):
                assert (a - b).abs().max() < 1e-12


def _accumulated(n: int) -> dict[str, int]:
    return {"accumulate_grad_batches": n}


# ---- where one pass is not exact -----------------------------------------------------------------------------------


def _with_layer(layer: nn.Module) -> AnswerModel:
    model = answer_model()
    model.hf.model.layers[0].mlp.up_proj = layer.double()
    return model


def _shared_outside() -> AnswerModel:
    model = answer_model()
    layer = model.hf.model.layers[0].mlp
    layer.register_forward_hook(lambda _, args, out: out + F.linear(args[0], layer.up_proj.weight)[..., :16])
    return model


LOSS = "the loss is no function of the forget answers' log-probabilities alone"


@pytest.mark.parametrize(
    ("objective", "model", "reason"),
    [
        (Logits, answer_model, LOSS),
        (Hidden, answer_model, LOSS),
        ("WGA", answer_model, LOSS),
        ("SatImp", answer_model, LOSS),
        ("CEU", answer_model, LOSS),
        (Other, answer_model, "the loss does not depend on the log-probabilities of the forget answers"),
        ("SAM", answer_model, "the forget loss is differentiated elsewhere than in the step's backward pass"),
        ("GradientAscent", lambda: _with_layer(Scaled(16, 24)), "no rule for trained weights of Scaled"),
        ("GradientAscent", _shared_outside, "a trained weight is used outside its own layer"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_two_passes_where_one_is_not_exact(
    objective: Any, model: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    results = []
    for passes in ("auto", "two"):
        torch.manual_seed(1)
        with caplog.at_level(logging.INFO):
            results.append(_weights_after(model(), passes, objective))
    assert equal(*results)
    lines = [record.getMessage() for record in caplog.records if "two backward passes" in record.getMessage()]
    assert lines == [f"Spy: two backward passes instead of one: {reason}"]
    with pytest.raises(UserError, match="passes") as caught:
        _weights_after(model(), "one", objective)
    assert reason in str(caught.value)


def test_a_sequence_that_the_loss_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        results = [gradients(answer_model(), passes, Subset, accumulate=2)[0] for passes in ("one", "two")]
    assert equal(*(step for one in results for step in one[:1]))  # two passes both times
    lines = [record.getMessage() for record in caplog.records if "two backward passes" in record.getMessage()]
    assert lines == [
        "Spy: two backward passes instead of one: the loss does not depend on every forget sequence of a batch"
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda hf: setattr(hf.config, "num_local_experts", 8), "a mixture of experts mixes"),
        (lambda hf: hf.add_module("norm", nn.BatchNorm1d(2, affine=False)), "BatchNorm1d mixes"),
        (lambda hf: vars(hf.lm_head).update(forward=nn.Identity()), "no rule for trained weights of Linear"),
        (lambda hf: setattr(hf.get_input_embeddings(), "max_norm", 1.0), "no rule for trained weights of Embedding"),
        (lambda hf: hf.add_module("_orig_mod", nn.Identity()), "the model is compiled"),
    ],
    ids=["experts", "batch norm", "replaced", "renormalised", "compiled"],
)
def test_obstacles(change: Any, reason: str) -> None:
    model = answer_model()
    assert obstacle(model, list(model.parameters())) is None
    change(model.hf)
    assert reason in str(obstacle(model, list(model.parameters())))


def test_another_layer_can_be_made_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(layer: Any, x: Tensor, delta: Tensor, *rest: Any) -> None:
        LAYERS[nn.Linear](layer, x, 2 * delta, *rest)

    monkeypatch.setitem(LAYERS, Scaled, scaled)
    results = []
    for passes in ("one", "two"):
        torch.manual_seed(0)
        results.append(gradients(_with_layer(Scaled(16, 24, bias=False)), passes)[0])
    assert difference(*results) < 1e-12


@pytest.mark.parametrize("objective", ["GradientAscent", "WGA"])
def test_nothing_outlives_the_step(objective: str) -> None:
    model, some = answer_model(), batch(0)
    module = objectives()[objective](regularizer=AttributionRegularizer(WEIGHT), retain_weight=0.0)
    module.log_dict = lambda *_, **__: None
    module.adopt(model.train(), None)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            seen: list[Any] = []
            handle = model.register_forward_hook(lambda *given, seen=seen: seen.append(weakref.ref(given[2].logits)))
            module.training_step(some, 0).backward()
            module.regularizer.apply(model)
            handle.remove()
            assert [logits() for logits in seen] == [None]
    finally:
        gc.enable()


def test_weight_zero_watches_nothing() -> None:
    model, regularizer = answer_model(), AttributionRegularizer(0.0)
    before = hooks(model)
    regularizer.before_forward(model, part([(3, 2)]))
    assert hooks(model) == before


def test_a_resumed_run_knows_that_one_pass_does_not_do(tmp_path: Path) -> None:
    """Found out in the first step, which ran both parts together; the later ones run them apart."""

    def module(regularizer: Regularizer) -> Any:
        made = Logits(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), regularizer=regularizer)
        made.adopt(answer_model().train(), None)
        return made

    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = module(Combined([AttributionRegularizer(WEIGHT, target="length_normalised")]))
    assert not whole.regularizer.differentiates
    bare_trainer(3, callbacks=[keep], enable_checkpointing=True).fit(whole, loader([batch(0)] * 3))
    assert whole.regularizer.differentiates
    again = module(Combined([AttributionRegularizer(WEIGHT, target="length_normalised")]))
    bare_trainer(3).fit(again, loader([batch(0)] * 3), ckpt_path=str(tmp_path / "step=1.ckpt"))
    assert equal(weights(again), weights(whole))


def test_checkpoints_from_before_it_was_kept_are_taken() -> None:
    regularizer = AttributionRegularizer()
    state = regularizer.state()
    assert state.pop("takes_two") is False
    check_states({"regularizer": state}, {"regularizer": regularizer}, None)
    regularizer.load_state(state)
    assert not regularizer.differentiates
    with pytest.raises(UserError, match="with the regularizer's state"):
        check_states({"regularizer": state | {"other": 1}}, {"regularizer": regularizer}, None)


def test_passes_is_checked() -> None:
    with pytest.raises(UserError, match=r"regularizer\.passes"):
        AttributionRegularizer(passes="three")  # type: ignore[arg-type]


def _weights_after(model: AnswerModel, passes: str, objective: Any) -> list[Tensor]:
    make = objectives()[objective] if isinstance(objective, str) else objective
    module = make(regularizer=Spy(WEIGHT, passes=passes))
    module.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.02)
    module.adopt(model.train(), None)
    bare_trainer(3).fit(module, loader([batch(n) for n in range(3)]))
    return weights(model)
