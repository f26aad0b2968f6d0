"""What an attack without training finds, and the rows of ``attack.json`` that say so."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.attacks.relearning import spread
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_tokenizer
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import naming


@dataclass
class Outcome:
    """One attack on one model, without any training.

    Args:
        model: ``"unlearned"`` or ``"oracle"``.
        kind: ``"quantization"``, ``"ablation"``, ``"sampling"`` or ``"paraphrase"``.
        variant: Which form of it, e.g. ``"8bit"``.
        seed: Of what is random; 0 where nothing is. For controls the number of the draw.
        n_scored: Questions scored.
        before: The model's score without the attack, percent.
        forget_score: Its score under the attack, percent.
        control: Whether this is the attack's control: random neurons instead of the flagged ones.
        n_neurons: How many neurons were changed; None where that is not what the attack does.
        score: What was measured; the score asked for, except where :mod:`~.sampling` counts answers given.
    """

    model: str
    kind: str
    variant: str
    seed: int
    n_scored: int
    before: float
    forget_score: float
    control: bool = False
    n_neurons: int | None = None
    score: str = ""


def outcome_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row for each variant: both models, the gap to the oracle seed by seed, and the control.

    Args:
        outcomes: All seeds of both models.

    Returns:
        Rows of ``attack.json``. ``control`` and ``n_neurons`` beside the models are the unlearned model's; the oracle's
        are inside ``oracle``.

    Example:
        >>> found = [Outcome(model, "quantization", "4bit", 0, 36, 5.0, score)
        ...          for model, score in (("unlearned", 30.0), ("oracle", 12.0))]
        >>> (row,) = outcome_rows(found)
        >>> row["attack"], row["variant"], row["unlearned"]["forget_score"]["mean"], row["gap"]["mean"]
        ('quantization', '4bit', 30.0, 18.0)
    """
    rows = []
    for kind, variant in dict.fromkeys((outcome.kind, outcome.variant) for outcome in outcomes):
        mine = [outcome for outcome in outcomes if (outcome.kind, outcome.variant) == (kind, variant)]
        row: dict[str, Any] = {"attack": kind, "kind": kind, "p": None, "variant": variant, "score": mine[0].score}
        row |= {"n_attack": None, "n_scored": mine[0].n_scored}
        for name in dict.fromkeys(outcome.model for outcome in mine):
            row[name] = _summary([outcome for outcome in mine if outcome.model == name])
        if "oracle" in row and "unlearned" in row:
            ours, oracle = (row[name]["forget_score"]["per_seed"] for name in ("unlearned", "oracle"))
            row["gap"] = spread([one - other for one, other in zip(ours, oracle, strict=True)])
        for key in ("control", "n_neurons"):
            if key in row.get("unlearned", {}):
                row[key] = row["unlearned"].pop(key)
        rows.append(row)
    return rows


def _summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    ordered = sorted(outcomes, key=lambda outcome: outcome.seed)
    attacked = [outcome for outcome in ordered if not outcome.control]
    controls = [outcome.forget_score for outcome in ordered if outcome.control]
    summary: dict[str, Any] = {
        "before": spread([outcome.before for outcome in attacked]),
        "forget_score": spread([outcome.forget_score for outcome in attacked]),
    }
    if controls:
        summary["control"] = {"forget_score": spread(controls)}
    if attacked[0].n_neurons is not None:
        summary["n_neurons"] = attacked[0].n_neurons
    return summary


def model_name(argument: str) -> str:
    """The name an attacked model has in the results, from the argument it was given for.

    Example:
        >>> model_name("model"), model_name("oracle")
        ('unlearned', 'oracle')
    """
    return "unlearned" if argument == "model" else argument


def load_alone(argument: str, checkpoint: str, where: Devices) -> tuple[AnswerModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer; what is wrong with them is told under the argument they were given for.

    Args:
        argument: The argument.
        checkpoint: What was given.
        where: Launched devices.

    Example:
        >>> model, tokenizer = load_alone("oracle", "tiny", Devices("cpu"))
        >>> tokenizer.padding_side
        'right'
    """
    if where.sharded:
        gc.collect()  # units of FSDP refer to each other, and two models at once may not fit
    with naming(argument):
        return where.load(checkpoint), load_tokenizer(checkpoint)


def forget_score(
    model: AnswerModel, tokenizer: PreTrainedTokenizerBase, data: UnlearningDataModule, score: str
) -> float:
    """A model's score on the whole forget set, percent; each rank scores its share.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> from lightning_ssiuu.models.loading import load_model, load_tokenizer
        >>> forget_score(AnswerModel(load_model("tiny")), load_tokenizer("tiny"), Facts(), "first_token")
        100.0
    """
    return evaluate(model, tokenizer, [data.eval_dataloader("forget")], [score])["forget"][score]
