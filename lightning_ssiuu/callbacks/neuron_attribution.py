"""Watch while training whether knowledge is erased or hidden, and flag the neurons that hide it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import astuple
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_ssiuu.attribution import influence
from lightning_ssiuu.attribution.activation_gradient import AttributionMethod
from lightning_ssiuu.attribution.aggregation import NeuronAttribution
from lightning_ssiuu.attribution.diagnosis import check_probes
from lightning_ssiuu.attribution.influence import InfluenceVariation, SpuriousNeuron
from lightning_ssiuu.attribution.methods import attribution_method
from lightning_ssiuu.callbacks.elicited import ElicitedLook, asked, fold_of
from lightning_ssiuu.callbacks.forget_threshold import ForgetThresholdStopping
from lightning_ssiuu.datamodules import RelearnDataModule, UnlearningDataModule
from lightning_ssiuu.evaluation.loaders import first_parts, run_directory, split_loader
from lightning_ssiuu.evaluation.scorer import untouched
from lightning_ssiuu.models.answers import AnswerModel, Target
from lightning_ssiuu.models.architectures import NeuronSite, architecture_of, neuron_sites
from lightning_ssiuu.utils.console import progress
from lightning_ssiuu.utils.errors import NotFinite, UserError
from lightning_ssiuu.utils.files import write_csv
from lightning_ssiuu.utils.loggers import log_image

_ADVERSARY = ElicitedLook()
#: Of the part of the forget set that it relearns, the same at every measurement; an attack's seeds are others.
_FOLD = 1000


class NeuronAttributionCallback(L.Callback):
    """Measures the influence variation D⁺ (erased) and D⁻ (hidden) before, during and after unlearning.

    Attributions (arXiv 2509.22263, Eq. 1) are taken on fixed probe examples of the forget and the retain set. Neurons
    whose D⁻ on forget exceeds the retain set's (1 − alpha) quantile for the same module are flagged as spurious
    unlearning neurons. Loss, gradients, random states and modes are never touched: training is the same without it.

    D⁻ says which neurons changed sides; what an attack will bring back is told better by ``elicited``, the forget score
    at the weights an adversary reaches who relearns a part of the forget set for a few steps and is scored on the rest
    (``docs/evidence/attribution.md``). It is in ``history``, ``influence.csv`` and the loggers
    (``attribution/elicited_<score>``, percent); ``elicited_value`` is the last one, ``score`` the stopping's, or the
    probability.

    Every measurement goes to the run's loggers (``attribution/d_plus_total``, …, ``attribution/layer3.mlp_up/d_minus``;
    to TensorBoard, W&B and MLflow also the heat maps, as the image ``attribution/heat_maps``, and at the end the
    curves, ``attribution/cumulative_curves``) and, with all before it, to ``influence.csv``. After ``fit``:
    ``variation`` (:class:`InfluenceVariation` on forget), ``flagged`` (list of :class:`SpuriousNeuron`), ``history``
    (totals per measurement), and under ``trainer.default_root_dir`` the files
    ``influence.csv``, ``spurious_neurons.csv``, ``plots/heat_maps.png`` and ``plots/cumulative_curves.png``.

    Args:
        probe_examples: Examples per set, over all ranks; the first ones of the evaluation loaders. 0 switches the
            callback off.
        every_n_steps: Also measure every so many optimiser steps; None measures only before and after.
        alpha: False-positive rate of the flags, in (0, 1).
        target: What is attributed: ``"sequence"``, ``"length_normalised"`` or ``"log_probability"``, see
            :func:`~lightning_ssiuu.models.answers.target_logps`.
        method: A name of :data:`~lightning_ssiuu.attribution.methods.METHODS`, or an ``AttributionMethod`` (or its
            import path), which has a target and a budget of its own; None takes activation × gradient.
        write: Whether to write the CSV files and the plots.
        memory_budget: Bytes an attribution may take beside the weights, or ``"2GB"``: the probes are batched anew to
            fit. None: batches of the evaluation loaders' size.
        elicited: The adversary (:class:`ElicitedLook`). A measurement takes its steps and one scoring of the forget
            set, and memory for a copy of the trained weights, their gradient and the adversary's optimiser; where that
            is not there on a single device, or the adversary diverges, a warning says so. None: no adversary, as with
            ``stopping.elicited``, which has one of its own, in float16, and where the forget set is too small or the
            data module no :class:`~lightning_ssiuu.UnlearningDataModule`.

    Example:
        >>> NeuronAttributionCallback(probe_examples=32, method="integrated_gradients").influence()
        {}
    """

    def __init__(
        self,
        probe_examples: int = 64,
        every_n_steps: int | None = None,
        alpha: float = 1e-3,
        target: Target = "sequence",
        method: str | AttributionMethod | None = None,
        write: bool = True,
        memory_budget: int | str | None = None,
        elicited: ElicitedLook | None = _ADVERSARY,
    ) -> None:
        check_probes(probe_examples, alpha, "attribution.", least=0)
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError("attribution.every_n_steps", every_n_steps, "a number ≥ 1, or null")
        self.probe_examples, self.every_n_steps, self.alpha = probe_examples, every_n_steps, alpha
        self.method = attribution_method(method, target, memory_budget, "attribution.method")
        self.write, self.elicited = write, elicited
        self.variation: InfluenceVariation | None = None
        self.flagged: list[SpuriousNeuron] = []
        self.history: list[dict[str, float]] = []
        self._probes: dict[str, list[Mapping[str, Any]]] = {}
        self._before: dict[str, NeuronAttribution] = {}
        self._sites: list[NeuronSite] = []
        self._stopping: ForgetThresholdStopping | None = None
        self._measured_step = 0  # nothing has moved before the first step
        self._fold: RelearnDataModule | None = None
        self.score = "probability"
        self.elicited_value: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.probe_examples == 0:
            return
        model = getattr(pl_module, "model", None)
        if not isinstance(model, AnswerModel):
            raise UserError("model", type(pl_module).__name__, "an UnlearningModule whose model is loaded")
        if architecture_of(model.hf) is None:
            kind = model.hf.config.model_type
            text = f"no neurons are diagnosed: {kind} is no known architecture (attribution.probe_examples 0 says so)"
            rank_zero_warn(f"NeuronAttributionCallback: {text}; the option architecture describes one")
            return
        self._sites = neuron_sites(model.hf)
        with untouched(model):
            for split in ("forget", "retain"):
                loader = split_loader(trainer, split)
                if loader is None:
                    raise UserError("data", split, "evaluation loaders for the forget and the retain set")
                self._probes[split] = first_parts(loader, split, self.probe_examples)
        if not self._before:  # a resumed run brings its own, without sites
            self._before = {split: self._attribute(model, split) for split in self._probes}
        for attribution in self._before.values():
            attribution.sites = self._sites
        self._prepare(trainer)
        mean = torch.tensor(self._before["forget"].log_probabilities, dtype=torch.float64).exp().mean().item()
        if mean > 0.99 or mean < 1e-6:
            state = "saturated: ∂P" if mean > 0.99 else "vanished: P"
            text = f"the probe answers' mean P is {mean:.3g}, {state} and hence every attribution is near 0"
            warnings.warn(f"NeuronAttributionCallback: {text}", stacklevel=2)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if self._before and self.every_n_steps and step % self.every_n_steps == 0 and step != self._measured_step:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not self._before:
            return
        model, variation = pl_module.model, self.variation
        walked = self._stopping is not None and self._stopping.walked_back is not None  # since the last step
        if variation is None or self._measured_step != trainer.global_step or walked:
            variation = self._measure(trainer, pl_module)
        retain = influence.influence_variation(self._before["retain"], self._attribute(model, "retain"))
        self.flagged = influence.spurious_neurons(variation, retain, self.alpha)
        curves, step = partial(_drawn, "cumulative_figure", {"": variation}), trainer.global_step
        log_image(trainer.loggers, "attribution/cumulative_curves", curves, step)
        if self.write and trainer.is_global_zero:
            from lightning_ssiuu.attribution.plots import save_cumulative_curves, save_heat_maps

            folder = Path(run_directory(trainer))
            write_csv(folder / "spurious_neurons.csv", influence.CSV_HEADER, map(astuple, self.flagged))
            save_heat_maps(folder / "plots" / "heat_maps.png", variation)
            save_cumulative_curves(folder / "plots" / "cumulative_curves.png", {"": variation})

    def influence(self) -> dict[str, float]:
        """Totals of the last measurement and the number of flagged neurons, by the keys of ``metrics.json``."""
        return self.variation.summary() | {"n_spurious": len(self.flagged)} if self.variation else {}

    def state_dict(self) -> dict[str, Any]:
        fields = attrgetter("maximum", "positive", "minimum", "n_examples", "log_probabilities", "highest_log")
        before = {split: list(fields(attribution)) for split, attribution in self._before.items()}
        return {"before": before, "history": self.history, "measured_step": self._measured_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self._measured_step = state_dict["history"], state_dict["measured_step"]
        self._before = {split: NeuronAttribution([], *values) for split, values in state_dict["before"].items()}

    def _attribute(self, model: AnswerModel, split: str) -> NeuronAttribution:
        with untouched(model):
            parts = progress(self._probes[split], f"attribution, {split}")
            return self.method(model, parts, self._sites).over_ranks()

    def _prepare(self, trainer: Any) -> None:
        # Whom to ask what comes back, and by which score.
        stopping = next((each for each in trainer.callbacks if isinstance(each, ForgetThresholdStopping)), None)
        self._stopping = stopping
        self.score = self.score if stopping is None else stopping.score
        told = stopping is not None and stopping.elicited is not None
        if self.elicited is None or told or str(trainer.precision).startswith("16-"):
            return
        if isinstance(trainer.datamodule, UnlearningDataModule):
            try:
                self._fold = fold_of(self.elicited, trainer.datamodule, _FOLD)
            except UserError:  # too few examples to relearn some and score others
                return

    def _ask(self, trainer: Any, pl_module: Any) -> float | None:
        if self._fold is None or self.elicited is None:
            return None
        try:
            return asked(self.elicited, self._fold, trainer, pl_module, self.score)
        except NotFinite as error:
            self._give_up(f"the adversary diverges: {error}")
        except torch.OutOfMemoryError:
            if trainer.world_size > 1:  # the others wait for this one
                raise
            self._give_up("no memory to ask an adversary what comes back (attribution.elicited null says so)")
        return None

    def _give_up(self, why: str) -> None:
        self._fold = None
        warnings.warn(f"NeuronAttributionCallback: {why}", stacklevel=3)

    def _measure(self, trainer: L.Trainer, pl_module: Any) -> InfluenceVariation:
        before = self._before["forget"]
        self.variation = variation = influence.influence_variation(before, self._attribute(pl_module.model, "forget"))
        figures = {f"attribution/{name}": value for name, value in variation.summary().items()}
        self.elicited_value = back = self._ask(trainer, pl_module)
        if back is not None:
            figures[f"attribution/elicited_{self.score}"] = back
        for name in ("d_plus", "d_minus"):
            means = influence.module_layer_means(before.by_site(getattr(variation, name)))
            for (layer, kind), value in means.items():
                figures[f"attribution/layer{layer}.{kind}/{name}"] = value
        self._measured_step = step = trainer.global_step
        if self.history and self.history[-1]["step"] == step:
            self.history.pop()  # a run resumed at its last step measures that step again
        self.history.append({"step": step} | variation.summary() | ({} if back is None else {"elicited": back}))
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=step)
        log_image(trainer.loggers, "attribution/heat_maps", partial(_drawn, "heat_maps_figure", variation), step)
        if self.write and trainer.is_global_zero:
            names = list(dict.fromkeys(name for entry in self.history for name in entry))
            rows = [[entry.get(name, "") for name in names] for entry in self.history]
            write_csv(Path(run_directory(trainer)) / "influence.csv", names, rows)
        return variation


def _drawn(name: str, of: Any) -> Any:
    from lightning_ssiuu.attribution import plots  # with it comes matplotlib

    return getattr(plots, name)(of)
