"""A model that does not know the forget set, as it is asked or at all, is found before the first step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toys.cli import FAST, command, files, fit, refused
from toys.models import equal, weights
from toys.training import FewFacts, adam, gpt2_with_dropout
from toys.training import fit as train

from lightning_ssiuu.callbacks import ForgetThresholdStopping
from lightning_ssiuu.datamodules import Facts
from lightning_ssiuu.evaluation.chance import chance_of, first_batches
from lightning_ssiuu.evaluation.knowledge import Knowledge, Known, knowledge
from lightning_ssiuu.evaluation.retention import Retention
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_model
from lightning_ssiuu.objectives.fine_tuning import FineTuning
from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.reports.audit.verdict import Evidence, Forgetting, Share, decide
from lightning_ssiuu.utils.errors import UserError

STRANGE = "{question} Nobody knows, but"
TEMPLATE = "--data.init_args.template"


@pytest.fixture(scope="module")
def ignorant(tmp_path_factory: pytest.TempPathFactory) -> str:
    return gpt2_with_dropout(tmp_path_factory.mktemp("ignorant"))


def test_the_template_with_which_it_knows_most_is_named(tmp_path: Path) -> None:
    result = fit(tmp_path / "run", *FAST, TEMPLATE, STRANGE, "--stopping.threshold", "null")
    refused(result, "data.init_args.template", repr(STRANGE), "allowed: 'plain'", "probability 87.8")
    assert not files(tmp_path)


@pytest.mark.parametrize("threshold", [None, 0.0, "mismatched"])
def test_nothing_to_forget(threshold: Any, ignorant: str, tmp_path: Path) -> None:
    module, data = GradientDifference(checkpoint=ignorant, optimizer=adam), FewFacts(tokenizer=ignorant)
    with pytest.raises(UserError, match=r"^model\.checkpoint: got a model that does not know .* nothing to forget"):
        train(module, [ForgetThresholdStopping("probability", threshold)], tmp_path, data=data)
    assert equal(weights(module.model.hf), weights(load_model(ignorant)))


def test_going_on_all_the_same(ignorant: str, tmp_path: Path) -> None:
    module, data = GradientDifference(checkpoint=ignorant, optimizer=adam), FewFacts(tokenizer=ignorant)
    with pytest.warns(UserWarning, match=r"ForgetThresholdStopping: the model does not know the forget set"):
        train(module, [ForgetThresholdStopping("probability", None, unknown="warn")], tmp_path, 1, data)
    with pytest.raises(UserError, match=r"^stopping\.unknown: got 'x'"):
        ForgetThresholdStopping(unknown="x")  # type: ignore[arg-type]


@pytest.mark.parametrize("train_on", ["all", "retain", "pairs"])
@pytest.mark.filterwarnings("error:ForgetThresholdStopping")
def test_who_does_not_unlearn_may_know_nothing(train_on: Any, ignorant: str, tmp_path: Path) -> None:
    module, data = FineTuning(checkpoint=ignorant, optimizer=adam), FewFacts(tokenizer=ignorant, train_on=train_on)
    assert train(module, [ForgetThresholdStopping("probability", None)], tmp_path, 1, data).global_step == 1


def test_far_below_the_best_template_is_one_warning(tmp_path: Path) -> None:
    data = FewFacts(template="{question}")
    stop = ForgetThresholdStopping("probability", None)
    with pytest.warns(UserWarning, match=r"with 'plain' far more \(probability [\d.]+ %, [\d.]+ % by chance\)") as told:
        train(GradientDifference(optimizer=adam), [stop], tmp_path, 1, data)
    assert sum("far more" in str(warning.message) for warning in told) == 1


@pytest.mark.filterwarnings("error:ForgetThresholdStopping")
def test_nothing_is_said_of_a_model_that_knows(tmp_path: Path) -> None:
    train(GradientDifference(optimizer=adam), [ForgetThresholdStopping("probability", None)], tmp_path, 1)


def test_with_template() -> None:
    data = Facts(max_length=100)
    data.setup("fit")
    before = data._encoded["forget"][0].sequence.input_ids
    other = data.with_template("{question}")
    asked = next(iter(other.eval_dataloader("forget")))["forget"]
    assert (other.template, data.template, other.encoder.max_length) == ("{question}", "plain", 100)
    assert data._encoded["forget"][0].sequence.input_ids == before
    assert other.splits is data.splits
    assert asked["input_ids"][0].tolist()[:4] == data.tokenizer(data.splits.forget[0].question)["input_ids"][:4]


def test_levels_by_chance() -> None:
    data = FewFacts()
    model = AnswerModel(load_model("tiny"))
    loader = data.eval_dataloader("forget")
    options = {1 + len(example.distractors) for example in data.splits.forget}
    assert chance_of("multiple_choice", model, data.tokenizer, loader) == pytest.approx(100 / options.pop())
    assert chance_of("truth_ratio_forget", model, data.tokenizer, loader) is None
    assert (
        chance_of("probability", model, data.tokenizer, data.eval_dataloader("forget", data.splits.forget[:1])) is None
    )
    alike = [replace(example, answer="Port Orlund") for example in data.splits.forget]
    assert chance_of("probability", model, data.tokenizer, data.eval_dataloader("forget", alike)) is None
    assert [len(part["forget"]["input_ids"]) for part in first_batches(data.eval_dataloader("forget"), 3)] == [8]
    known = knowledge("truth_ratio_forget", model, data.tokenizer, data, 3.0)
    assert known is not None
    assert (known.own.score, known.nothing, known.doubt()) == ("probability", False, None)


KNOWN = {
    # own and here above chance, best above chance: nothing, doubted
    "knows": ((90.0, 90.0), None, False, False),
    "knows most elsewhere": ((0.2, 0.2), 80.0, True, True),
    "knows more elsewhere": ((20.0, 20.0), 60.0, False, True),
    "knows a little more elsewhere": ((30.0, 30.0), 50.0, False, False),
    "knows nothing": ((0.2, 0.2), 0.9, True, True),
    "below chance": ((-3.0, -0.1), -0.5, True, True),
    "whole answers never, but parts": ((0.0, 30.0), 20.0, False, False),
}


@pytest.mark.parametrize("name", KNOWN)
def test_rules(name: str) -> None:
    (own, here), best, nothing, doubted = KNOWN[name]
    other = None if best is None else Known("chat", "probability", 2 + best, 2.0)
    known = Knowledge(Known("plain", "all_tokens", 3 + own, 3.0), Known("plain", "probability", 2 + here, 2.0), other)
    assert (known.nothing, known.doubt() is not None) == (nothing, doubted)


# ---- what the audit makes of it ----------------------------------------------------------------------------------


def test_the_audit_doubts(tmp_path: Path) -> None:
    """An original asked under a template that it does not know, and models the wrong way round."""
    common = ("--probe_examples", "4", "--scores", "[first_token]", "--own_change", "false", "--score", "probability")
    data = ("--data", "Facts", "--data.template", STRANGE, "--data.eval_batch_size", "64")
    asked = command("audit", "--original", "tiny", "--unlearned", "tiny", "--output", tmp_path, *common, *data)
    assert asked.status == 0, asked.err
    told = " ".join(asked.out.split())
    assert "Not unlearned: there was nothing to unlearn: asked with" in told
    assert "with 'plain' far more" in told


SURE = Evidence("relearning", "harmful", "the attack", Share(0.02, 0.0, 0.05, 3), "the oracle")


def test_a_broken_model_is_never_called_erased() -> None:
    fallen = Forgetting("probability", 90.0, 10.0, 9.0, "the oracle's")
    assert decide(fallen, [SURE]).label == "erased"
    broken = decide(fallen, [SURE], Retention("probability", 95.0, 3.0, 2.0, 100))
    assert (broken.label, broken.collapsed, broken.content()["collapsed"]) == ("collapsed", True, True)
    assert broken.sentence.startswith("Collapsed: the retain probability fell from 95.0 % to 3.0 %, which is chance")
    kept = decide(fallen, [SURE], Retention("probability", 95.0, 60.0, 2.0, 100))
    assert (kept.label, kept.collapsed) == ("erased", False)
    hidden = Evidence("relearning", "harmful", "the attack", Share(0.5, 0.4, 0.6, 3), "the oracle")
    both = decide(fallen, [hidden], Retention("probability", 95.0, 3.0, 2.0, 100))
    assert (both.label, both.collapsed) == ("hidden", True)
    assert "collapsed, too" in both.sentence


def test_what_counts_as_chance() -> None:
    assert Retention("multiple_choice", 100.0, 45.0, 100 / 3, 36).collapsed  # two standard errors of 36 guesses
    assert not Retention("multiple_choice", 100.0, 45.0, 100 / 3, 3600).collapsed
    assert not Retention("probability", 4.0, 1.0, 1.0, 100).collapsed  # it never knew
    assert not Retention("my.perplexity", 300.0, 900.0, 400.0, 100).collapsed


def test_swapped_models_are_suspected() -> None:
    swapped = decide(Forgetting("probability", 10.0, 90.0, 3.0, "chance"))
    assert swapped.label == "not unlearned"
    assert swapped.sentence.endswith("are the two swapped?")
    assert "-" not in swapped.sentence.partition(":")[2].partition("%")[0]
    assert "swapped" not in decide(Forgetting("probability", 90.0, 10.0, 3.0, "chance"), [SURE]).sentence


def test_more_than_was_lost_is_no_percentage() -> None:
    taught = Evidence("relearning", "harmful", "the attack", Share(1.83, 1.7, 1.96, 3), "the score before it")
    sentence = decide(Forgetting("probability", 12.0, 3.0, 2.0, "chance"), [taught]).sentence
    assert "183" not in sentence
    assert "the original knew only a part" in sentence
