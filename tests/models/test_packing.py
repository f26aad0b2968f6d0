"""One row without padding gives what padded batches give, to rounding in float64, for every architecture."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from toys.models import TOYS, part, random_model
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_ssiuu.datamodules.pairs import batch_of
from lightning_ssiuu.models import packing
from lightning_ssiuu.models.answers import AnswerModel, Answers
from lightning_ssiuu.models.packing import NAME, Packing, apart, at, longest_packed, padded, register, takes_rows

#: Toys whose attention is none of transformers' functions, or refuses SDPA: their batches stay padded.
PADDED = {"falcon", "falcon_mq", "falcon_rw", "gpt_neo", "gemma2"}
FORGET, RETAIN = [(3, 2), (1, 4), (5, 1)], [(2, 6), (4, 1)]


def loss_and_gradients(model: AnswerModel, answers: tuple[Answers, ...]) -> tuple[Tensor, list[Tensor]]:
    weights = [torch.linspace(0.5, 2, a.n_sequences, dtype=torch.float64) for a in answers]
    loss = sum((w * a.mean_logps).sum() * (-1) ** n for n, (w, a) in enumerate(zip(weights, answers, strict=True)))
    assert isinstance(loss, Tensor)
    return loss, list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("name", [*TOYS])
def test_packed_is_padded(name: str) -> None:
    model = AnswerModel(random_model(name)).train()
    assert model.packs == (name not in PADDED)
    forget, retain = part(FORGET), part(RETAIN)
    del forget["example_id"], retain["example_id"]
    with padded(model):
        expected = loss_and_gradients(model, (model(**forget), model(**retain)))
        assert model.packing is None
    joint = loss_and_gradients(model, model(*forget.values(), retain))
    assert (model.packing is not None) == model.packs
    alone = loss_and_gradients(model, (model(**forget), model(**retain)))
    for loss, gradients in (joint, alone):
        torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=0)
        for gradient, own in zip(gradients, expected[1], strict=True):
            torch.testing.assert_close(gradient, own, rtol=1e-9, atol=1e-12)


def options(turn: list[int]) -> dict[str, Any]:
    """Two questions with three and two options, of which some begin alike beyond the question; before each a turn."""
    prompts, answers = [[*turn, 5, 6, 7], [*turn, 8, 9]], [[[3, 4], [3, 5, 6], [2]], [[11], [12, 13, 14]]]
    rows = [(prompt, answer) for prompt, each in zip(prompts, answers, strict=True) for answer in each]
    return batch_of(rows, 1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "gemma3_text", "falcon"])
@pytest.mark.parametrize("turn", [[], [4, 4]])
def test_options_share_their_prompt_and_all_of_them_what_stands_before_it(name: str, turn: list[int]) -> None:
    model = AnswerModel(random_model(name))
    some = options(turn)
    with padded(model):
        expected = loss_and_gradients(model, (model(**some),))
    found = loss_and_gradients(model, (model(**some, share=True),))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=0)
    for gradient, own in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(gradient, own, rtol=1e-9, atol=1e-12)
    if model.packing is not None:
        # Of each question once, and of options what predicts a token: [3], [5] after the same 3, []; [], [12, 13].
        assert len(model.packing.flat) == len(turn) + (3 + 1 + 1 + 0) + (2 + 0 + 2)


def test_where_tokens_stand() -> None:
    needed = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    packing = Packing.of(needed)
    values = torch.arange(6.0).view(2, 3, 1)
    assert packing.row(values).flatten().tolist() == [0, 1, 3, 4, 5]
    assert packing.sequences.tolist() == [0, 0, 1, 1, 1]
    assert packing.apart(packing.row(values)).squeeze(-1).tolist() == [[0, 1, 0], [3, 4, 5]]
    at_two = at(packing.row(values), packing, torch.tensor([0, 1]), torch.tensor([1, 2]))
    assert at_two.flatten().tolist() == at(values, None, torch.tensor([0, 1]), torch.tensor([1, 2])).flatten().tolist()
    assert apart(values, None) is values


def left(some: dict[str, Tensor]) -> dict[str, Tensor]:
    lengths = some["attention_mask"].sum(1).tolist()
    return {k: torch.stack([row.roll(-n) for row, n in zip(v, lengths, strict=True)]) for k, v in some.items()}


def test_batches_that_are_not_packed() -> None:
    model, some = AnswerModel(random_model("mistral", sliding_window=6)), part([(3, 2), (1, 3)])
    del some["example_id"]
    model(**some)
    assert model.packing is not None
    for other in (left(some), part([(3, 5), (1, 4)]), {**some, "labels": torch.full_like(some["labels"], -100)}):
        own = {name: value for name, value in other.items() if name != "example_id"}
        answers = model(**own)
        assert model.packing is None
        with padded(model):
            assert torch.equal(model(**own).logits, answers.logits)
    both = model(*left(some).values(), some)
    assert [len(each.logits) for each in both] == [5, 5]


def test_attention_that_is_set_later_takes_no_packed_rows() -> None:
    """By position, of sequences that share a beginning, the later ones would not see it."""
    model, some = AnswerModel(random_model("llama")), options([4, 4])
    expected = model(**some, share=True).logits
    assert takes_rows(model.hf, shared=True)
    for name in ("sdpa", "eager"):
        model.hf.set_attn_implementation(name)
        torch.testing.assert_close(model(**some, share=True).logits, expected, rtol=0, atol=1e-6)
        assert model.packing is None
    for name in ("flash_attention_2", "flex_attention"):
        model.hf.config._attn_implementation = name
        assert takes_rows(model.hf)
        assert not takes_rows(model.hf, shared=True)


def test_a_model_of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    model, some = AnswerModel(random_model("llama")), options([])
    expected, pickled = model(**some).logits, pickle.dumps(model)
    for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        monkeypatch.delitem(functions._global_mapping, NAME)
    register.cache_clear()
    assert torch.equal(pickle.loads(pickled)(**some).logits, expected)


HYBRIDS: dict[str, dict[str, Any]] = {
    "Lfm2Config": {"layer_types": ["conv", "full_attention"]},
    "JambaConfig": {"num_experts": 2, "attn_layer_offset": 1, "attn_layer_period": 2, "use_mamba_kernels": False},
}


@pytest.mark.parametrize("kind", HYBRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_go_along_the_row_are_found_out_where_values_hardly_show_it(kind: str, dtype: torch.dtype) -> None:
    config = getattr(transformers, kind)(**TOYS["llama"][1] | {"initializer_range": 0.02} | HYBRIDS[kind])
    assert not AnswerModel(transformers.AutoModelForCausalLM.from_config(config).to(dtype)).packs


def test_a_layer_without_weights_says_nothing_of_the_next_model() -> None:
    """All its rows are alike, however they are laid out."""
    options = TOYS["llama"][1] | HYBRIDS["Lfm2Config"] | {"initializer_range": 0.02}
    empty, whole = (transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**options)) for _ in range(2))
    with torch.no_grad():
        empty.model.layers[0].conv.in_proj.weight.zero_()
    assert AnswerModel(empty).packs
    assert not AnswerModel(whole).packs


def test_the_window_of_a_model_of_text_and_images() -> None:
    text = TOYS["gemma3_text"][1] | {"sliding_window": 6}
    assert longest_packed(transformers.Gemma3Config(text_config=text)) == 6


def test_layers_of_another_kind_of_attention_are_found_out(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    hf = random_model("llama")
    own = type(hf.model.layers[0].self_attn).forward

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        hidden_states = hidden_states + 0.01 * hidden_states.mean(1, keepdim=True)  # sees the whole row
        return own(self, hidden_states=hidden_states, **kwargs)

    monkeypatch.setattr(type(hf.model.layers[0].self_attn), "forward", forward)
    hf.config.model_type = "of my own"
    with caplog.at_level("INFO"):
        model = AnswerModel(hf)
    assert not model.packs
    assert hf.config._attn_implementation == "sdpa"
    assert "of my own: batches are padded, not packed into one row: packed rows give other values." in caplog.text


def test_a_kind_of_model_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(packing, "_allowed", set())
    monkeypatch.setattr(packing, "_gives_the_same", lambda hf: tried.append(hf) or hf.config.vocab_size != 37)
    for models, times in (
        ([random_model(seed=seed) for seed in range(2)], 1),
        ([random_model(num_hidden_layers=1), random_model(dtype=torch.float32)], 2),
        ([random_model(vocab_size=37) for _ in range(2)], 2),  # found out not to take them
    ):
        tried.clear()
        assert all(AnswerModel(hf).packs == (hf.config.vocab_size != 37) for hf in models)
        assert len(tried) == times
    (hooked := random_model()).model.norm.register_forward_hook(lambda *_: None)
    assert AnswerModel(hooked).packs
    assert tried[-1] is hooked


def test_nothing_of_it_is_saved_and_generation_is_as_before(tmp_path: Any) -> None:
    hf, ids = random_model("llama"), torch.tensor([[1, 1, 4, 5], [2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    asked = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    before = hf.generate(**asked)
    model = AnswerModel(hf)
    assert hf.config._attn_implementation == NAME
    assert torch.equal(model.generate(**asked), before)
    hf.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_recomputed_activations_are_those_of_the_row(checkpointing: bool) -> None:
    model = AnswerModel(random_model("llama")).train()
    forget, retain = part(FORGET), part(RETAIN)
    del forget["example_id"], retain["example_id"]
    with padded(model):
        expected = loss_and_gradients(model, (model(**forget), model(**retain)))
    if checkpointing:
        model.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss, gradients = loss_and_gradients(model, model(*forget.values(), retain))
    for gradient, own in zip([loss, *gradients], [expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(gradient, own, rtol=1e-9, atol=1e-12)


def test_a_model_wrapped_in_inference_mode_packs() -> None:
    with torch.inference_mode():
        assert AnswerModel(random_model("llama")).packs
    hf = random_model("llama")
    with torch.inference_mode():
        assert AnswerModel(hf).packs
