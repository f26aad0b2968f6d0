"""Erase or hide? Compare a model before and after unlearning, whoever unlearned it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.attribution.activation_gradient import AttributionMethod, NeuronAttribution, neuron_attribution
from lightning_ssiuu.attribution.influence import (
    Correlation,
    InfluenceVariation,
    SpuriousNeuron,
    correlation_interval,
    influence_variation,
    spurious_neurons,
)
from lightning_ssiuu.attribution.weight_change import OwnFlag
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.evaluation.loaders import first_parts
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.answers import AnswerModel, Target
from lightning_ssiuu.models.architectures import neuron_sites
from lightning_ssiuu.models.checks import tokenizers_differ
from lightning_ssiuu.models.loading import load_tokenizer
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.console import progress
from lightning_ssiuu.utils.errors import UserError


@dataclass
class Examined:
    """What one model says: ``{split: {score: percent}}``, and attributions on the forget and retain probes."""

    scores: dict[str, dict[str, float]]
    attribution: dict[str, NeuronAttribution] = field(repr=False)


def examine(
    checkpoint: str,
    data: UnlearningDataModule,
    probe_examples: int = 64,
    target: Target = "sequence",
    scores: Sequence[str] | None = None,
    devices: Devices | None = None,
) -> Examined:
    """Load a model, score it and attribute its answers; only one model is in memory at a time.

    On several ranks each takes its share of the examples; every rank gets the figures of all.

    Args:
        checkpoint: Any checkpoint.
        data: The data module to judge by.
        probe_examples: Examples per set for the attribution.
        target: See :func:`~lightning_ssiuu.models.answers.target_logps`.
        scores: Names, None for all that need no generated text.
        devices: Launched; None: the CPU.

    Raises:
        UserError: If the checkpoint's tokenizer splits text differently from the data module's: the models could
            not be compared token by token.
    """
    tokenizer = load_tokenizer(checkpoint)
    devices = devices if devices is not None else Devices("cpu")
    return examine_model(devices.load(checkpoint), tokenizer, data, probe_examples, target, scores)


def examine_model(
    model: AnswerModel,
    tokenizer: PreTrainedTokenizerBase,
    data: UnlearningDataModule,
    probe_examples: int = 64,
    target: Target = "sequence",
    scores: Sequence[str] | None = None,
    also: Sequence[str] = (),
    method: AttributionMethod | None = None,
) -> Examined:
    """:func:`examine` for a model in memory; ``also`` names scores to add, ``method`` as for :func:`attributions`."""
    if tokenizers_differ(tokenizer, data.tokenizer) is not None:
        raise UserError("model", tokenizer.name_or_path, "models that share one tokenizer")
    wanted = None if scores is None else list(dict.fromkeys([*scores, *also]))
    measured = evaluate(model, tokenizer, data.val_dataloader(), wanted, also)
    return Examined(measured, attributions(model, data, probe_examples, target, method))


def attributions(
    model: AnswerModel,
    data: UnlearningDataModule,
    probe_examples: int = 64,
    target: Target = "sequence",
    method: AttributionMethod | None = None,
) -> dict[str, NeuronAttribution]:
    """Attribute a model's answers on the first examples of the forget and the retain set, over all ranks.

    The figures are the same on every rank. ``method`` has its own target; None: activation × gradient of ``target``.
    """
    sites = neuron_sites(model.hf)
    method = method or partial(neuron_attribution, target=target)
    return {
        split: method(
            model,
            progress(first_parts(data.eval_dataloader(split), split, probe_examples), f"attribution, {split}"),
            sites,
        ).over_ranks()
        for split in ("forget", "retain")
    }


@dataclass(frozen=True)
class Diagnosis:
    """How a model differs from the original: D⁺ and D⁻ on the forget set, spurious unlearning neurons by D⁻.

    ``own`` are those by what their own changed weights cost; empty also where that was not measured.
    """

    variation: InfluenceVariation
    flagged: list[SpuriousNeuron]
    own: list[SpuriousNeuron] = field(default_factory=list)

    @property
    def table(self) -> list[SpuriousNeuron]:
        """All flagged neurons, each once: by their own change first, then by D⁻, the largest first."""
        by_place: dict[tuple[str, int, int], SpuriousNeuron] = {}
        for neuron in (*self.own, *self.flagged):
            by_place.setdefault((neuron.module, neuron.layer, neuron.index), neuron)
        return list(by_place.values())

    def figures(self) -> dict[str, float]:
        """The ``influence`` block of the JSON files."""
        return self.variation.summary() | {"n_spurious": len(self.flagged)}


def diagnose(
    original: Examined, changed: Examined, alpha: float = 1e-3, own: Sequence[OwnFlag] | None = None
) -> Diagnosis:
    """Influence variation and spurious neurons between two examined models.

    Args:
        original: The model before.
        changed: The model after.
        alpha: False-positive rate of the flags.
        own: Flags by what the neurons' own changed weights cost, if measured
            (:mod:`~lightning_ssiuu.attribution.weight_change`).
    """
    forget, retain = (
        influence_variation(original.attribution[split], changed.attribution[split]) for split in ("forget", "retain")
    )
    own_flagged = [] if own is None else spurious_neurons(forget, retain, alpha, own)
    return Diagnosis(forget, spurious_neurons(forget, retain, alpha), own_flagged)


def attribution_correlation(
    first: Mapping[str, NeuronAttribution], second: Mapping[str, NeuronAttribution]
) -> Correlation:
    """Pearson ρ between the forget-set attributions of two models, over all neurons' positive and negative influence.

    Before and after a harmful attack: the nearer to 1, the less the attack moved (arXiv 2509.22263, Sec. 5).
    """
    return correlation_interval(influences(first["forget"]), influences(second["forget"]))


def check_probes(probe_examples: int, alpha: float, section: str = "", least: int = 1) -> None:
    """Refuse fewer probes than ``least`` and a false-positive rate outside (0, 1), named with their ``section``."""
    if not (isinstance(probe_examples, int) and probe_examples >= least):
        raise UserError(f"{section}probe_examples", probe_examples, f"a whole number ≥ {least}")
    if not 0 < alpha < 1:
        raise UserError(f"{section}alpha", alpha, "a false-positive rate in (0, 1)")


def influences(attribution: NeuronAttribution) -> Tensor:
    """``[2 · n_neurons]`` mean positive, then mean negative influence of every neuron."""
    return torch.cat([attribution.mean_maximum, attribution.mean_minimum])
