"""Attacks that train nothing: quantisation, neuron ablation, sampling and other wordings of the question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from lightning_ssiuu.attacks.ablation import Ablation, ablation_attack, check_ablation
from lightning_ssiuu.attacks.base import Outcome, outcome_rows
from lightning_ssiuu.attacks.paraphrase import other_questions, paraphrase_attack
from lightning_ssiuu.attacks.quantization import WIDTHS, check_quantization, quantization_attack
from lightning_ssiuu.attacks.sampling import Sampling, sampling_attack
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.evaluation.scores import check_score
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError

__all__ = ["Ablation", "Outcome", "Sampling", "attack_without_training", "check_without_training", "outcome_rows"]

Kind = Literal["quantization", "ablation", "sampling", "paraphrase"]


def check_without_training(
    kind: str,
    data: UnlearningDataModule,
    score: str,
    where: Devices,
    seeds: Sequence[int] = (0, 1, 2),
    quantization: Sequence[str] = WIDTHS,
    ablation: Ablation | None = None,
) -> None:
    """Check everything a user may have got wrong, before processes are started and models are loaded.

    Args:
        kind: Of the attack.
        data: The data module.
        score: A score's name.
        where: Not launched yet.
        seeds: As for :func:`attack_without_training`.
        quantization: As for :func:`attack_without_training`.
        ablation: As for :func:`attack_without_training`.

    Raises:
        UserError: Naming the argument.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> check_without_training("ablation", Facts(), "probability", Devices("cpu"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: ablation.original: got None, allowed: the model before unlearning: ...
    """
    if kind not in get_args(Kind):
        raise UserError("kind", kind, f"one of {list(get_args(Kind))}")
    check_score(score, "score")
    data.setup("validate")
    data.check_share(where.n_ranks)
    if kind == "quantization":
        check_quantization(quantization, where)
    elif kind == "ablation":
        check_ablation(data, score, where, ablation if ablation is not None else Ablation())
    elif kind == "paraphrase":
        other_questions(data)
    elif not seeds or min(seeds) < 0:
        raise UserError("seeds", list(seeds), "at least one, all ≥ 0")


def attack_without_training(
    kind: str,
    models: Mapping[str, str],
    data: UnlearningDataModule,
    score: str,
    where: Devices,
    seeds: Sequence[int] = (0, 1, 2),
    quantization: Sequence[str] = WIDTHS,
    ablation: Ablation | None = None,
    sampling: Sampling | None = None,
) -> list[Outcome]:
    """Attack saved models without training; the weights on disk and the data stay as they are.

    Args:
        kind: ``"quantization"`` (:mod:`~.quantization`), ``"ablation"`` (:mod:`~.ablation`), ``"sampling"``
            (:mod:`~.sampling`) or ``"paraphrase"`` (:mod:`~.paraphrase`).
        models: Checkpoint by the name of the argument it was given for, ``"model"`` and perhaps ``"oracle"``.
        data: The data module the model was unlearned with.
        score: A score's name.
        where: Launched devices; each rank takes its share of the questions and gets the outcome of all.
        seeds: Of what is sampled; the other kinds draw nothing by them.
        quantization: Widths, for ``"quantization"``.
        ablation: Options of ``"ablation"``.
        sampling: Options of ``"sampling"``.

    Returns:
        What was found, ready for :func:`outcome_rows`.

    Raises:
        UserError: What :func:`check_without_training` raises, and what is found only while loading.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> found = attack_without_training("paraphrase", {"model": "tiny"}, Facts(), "first_token", Devices("cpu"))
        >>> [(row["variant"], row["n_scored"], row["unlearned"]["before"]["mean"]) for row in outcome_rows(found)]
        [('reworded', 144, 100.0)]
    """
    check_without_training(kind, data, score, where, seeds, quantization, ablation)
    if kind == "quantization":
        return quantization_attack(models, data, score, where, quantization)
    if kind == "ablation":
        return ablation_attack(models, data, score, where, ablation if ablation is not None else Ablation())
    if kind == "sampling":
        return sampling_attack(models, data, score, where, seeds, sampling)
    return paraphrase_attack(models, data, score, where)
