"""Erase or hide? Compare a model before and after unlearning, whoever unlearned it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.callbacks.loaders import first_parts
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.devices import Devices
from lightning_ssiuu.errors import UserError
from lightning_ssiuu.evaluation import evaluate
from lightning_ssiuu.functional.attribution import NeuronAttribution, Target, neuron_attribution
from lightning_ssiuu.functional.influence import (
    InfluenceVariation,
    SpuriousNeuron,
    influence_variation,
    spurious_neurons,
)
from lightning_ssiuu.models import load_tokenizer
from lightning_ssiuu.progress import progress
from lightning_ssiuu.sites import neuron_sites


@dataclass
class Examined:
    """What one model says: scores of every split, attributions on forget and retain probes.

    Args:
        scores: ``{split: {score: percent}}``.
        attribution: ``{"forget": ..., "retain": ...}``.
    """

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
        target: See :func:`~lightning_ssiuu.functional.attribution.target_logps`.
        scores: Names, None for all that need no generated text.
        devices: Launched; None: the CPU.

    Raises:
        UserError: If the checkpoint's tokenizer splits text differently from the data module's: the models could
            not be compared token by token.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> examined = examine("tiny", Facts(), probe_examples=4, scores=["first_token"])
        >>> examined.scores["forget"]["first_token"], examined.attribution["forget"].n_examples
        (100.0, 4)
    """
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(checkpoint)
    if tokenizer.get_vocab() != data.tokenizer.get_vocab():
        raise UserError("model", checkpoint, "models that share one tokenizer")
    devices = devices if devices is not None else Devices("cpu")
    model = devices.load(checkpoint)
    measured = evaluate(model, tokenizer, data.val_dataloader(), scores)
    sites = neuron_sites(model.hf)
    attribution = {
        split: neuron_attribution(
            model,
            progress(first_parts(data.eval_dataloader(split), split, probe_examples), f"attribution, {split}"),
            sites,
            target,
        ).over_ranks()
        for split in ("forget", "retain")
    }
    return Examined(measured, attribution)


@dataclass(frozen=True)
class Diagnosis:
    """How a model differs from the original.

    Args:
        variation: D⁺ and D⁻ on the forget set.
        flagged: Spurious unlearning neurons.
    """

    variation: InfluenceVariation
    flagged: list[SpuriousNeuron]

    def figures(self) -> dict[str, float]:
        """The ``influence`` block of the JSON files."""
        return self.variation.summary() | {"n_spurious": len(self.flagged)}


def diagnose(original: Examined, changed: Examined, alpha: float = 1e-3) -> Diagnosis:
    """Influence variation and spurious neurons between two examined models.

    Args:
        original: The model before.
        changed: The model after.
        alpha: False-positive rate of the flags.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> tiny = examine("tiny", Facts(), probe_examples=2, scores=["first_token"])
        >>> diagnose(tiny, tiny).figures()["d_minus_total"]
        0.0
    """
    by_split = {
        split: influence_variation(original.attribution[split], changed.attribution[split])
        for split in ("forget", "retain")
    }
    return Diagnosis(by_split["forget"], spurious_neurons(by_split["forget"], by_split["retain"], alpha))


def attribution_correlation(first: Mapping[str, NeuronAttribution], second: Mapping[str, NeuronAttribution]) -> float:
    """Pearson ρ between the forget-set attributions of two models, over all neurons' positive and negative influence.

    Before and after a harmful attack: the nearer to 1, the less the attack moved (arXiv 2509.22263, Sec. 5). NaN is
    never returned: a model without any attribution correlates with nothing, 0.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> tiny = examine("tiny", Facts(), probe_examples=2, scores=["first_token"]).attribution
        >>> round(attribution_correlation(tiny, tiny), 6)
        1.0
    """
    rho = torch.corrcoef(torch.stack([_influences(first["forget"]), _influences(second["forget"])]))[0, 1]
    return 0.0 if rho.isnan() else rho.item()


def _influences(attribution: NeuronAttribution) -> Tensor:
    return torch.cat([attribution.mean_maximum, attribution.mean_minimum])
