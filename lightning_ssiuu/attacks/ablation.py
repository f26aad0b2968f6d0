"""Undo the flagged neurons and nothing else: if the answers return, they were hidden and not erased.

The causal check of a diagnosis: neurons that unlearning turned against the answers, by their influence
(arXiv 2509.22263), are put back to the activations they had before it, token by token, or set to zero. Random neurons
of the same kinds are the control. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_ssiuu.attacks.base import Attack, Outcome, Target, forget_score
from lightning_ssiuu.attribution.activation_gradient import NeuronAttribution
from lightning_ssiuu.attribution.diagnosis import Examined, attributions, check_probes, diagnose
from lightning_ssiuu.attribution.methods import attribution_method
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.evaluation.runs import check_tokenizers, resolve_models
from lightning_ssiuu.evaluation.scores import SCORES
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.answers import Target as TargetOfAttribution
from lightning_ssiuu.models.architectures import NeuronSite
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError, naming

#: A neuron: layer, kind of site, place in the site.
Neuron = tuple[int, str, int]
#: Columns of a module's output, ascending, by the module's dotted name.
Columns = dict[str, Tensor]
_ORIGINAL = "attack.original"


def output_columns(sites: Sequence[NeuronSite], neurons: Iterable[Neuron]) -> Columns:
    """The neurons' columns in the outputs of their modules; kinds that share a projection come together."""
    by_key: dict[tuple[int, str], NeuronSite] = {site.key: site for site in sites}
    columns: dict[str, set[int]] = {}
    for layer, kind, index in neurons:
        site = by_key[layer, kind]
        columns.setdefault(site.module_name, set()).add(index if site.columns is None else int(site.columns[index]))
    return {name: torch.tensor(sorted(of_module)) for name, of_module in columns.items()}


def control_neurons(sites: Sequence[NeuronSite], flagged: Iterable[Neuron], seed: int) -> list[Neuron]:
    """As many random neurons of each kind as are flagged, none of them flagged, from all layers.

    Fewer where a kind has no more that are not flagged.
    """
    taken = set(flagged)
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Neuron] = []
    for kind in dict.fromkeys(site.kind for site in sites):
        everything = [(*site.key, index) for site in sites if site.kind == kind for index in range(site.width)]
        free = [neuron for neuron in everything if neuron not in taken]
        count = len(everything) - len(free)
        drawn += [free[place] for place in torch.randperm(len(free), generator=generator)[:count].tolist()]
    return drawn


@dataclass
class Recording:
    """Activations of some neurons in every forward pass, in main memory: by module ``[B, L, n]`` pass by pass."""

    columns: Columns
    passes: dict[str, list[Tensor]] = field(default_factory=dict)

    def of(self, hf: nn.Module) -> AbstractContextManager[None]:
        """Records the forward passes made inside."""

        def record(name: str, output: Tensor) -> None:
            columns = self.columns[name].to(output.device)
            self.passes.setdefault(name, []).append(output.detach()[..., columns].cpu())

        return _hooked(hf, self.columns, record)


def patched(hf: nn.Module, columns: Columns, recording: Recording | None = None) -> AbstractContextManager[None]:
    """Inside, some neurons have recorded activations instead of their own, or are zero where there is no recording.

    The recording holds at least these neurons, for the same passes in the same order.
    """
    passes = {} if recording is None else {name: iter(recording.passes[name]) for name in columns}

    def change(name: str, output: Tensor) -> Tensor:
        output, own = output.clone(), columns[name]
        values: Tensor | int = 0
        if recording is not None:
            values = next(passes[name])[..., torch.searchsorted(recording.columns[name], own)].to(output)
        output[..., own.to(output.device)] = values
        return output

    return _hooked(hf, columns, change)


@contextmanager
def _hooked(hf: nn.Module, names: Iterable[str], function: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    with ExitStack() as handles:
        for name in names:
            hook = hf.get_submodule(name).register_forward_hook
            handles.enter_context(hook(lambda _module, _args, output, name=name: function(name, output)))
        yield


@dataclass(frozen=True)
class _Plan:
    before: float
    flagged: Columns
    controls: list[Columns]
    n_neurons: int


@dataclass
class Ablation(Attack):
    """Put flagged neurons back to what they were before unlearning, or to zero, and score the forget set again.

    Neurons are flagged by :func:`~lightning_ssiuu.attribution.influence.spurious_neurons` between ``original`` and each
    model. The original model's activations are recorded first, on the same tokens, for every forward pass the score
    makes; only one model is in memory at a time, the recording (flagged and control neurons × tokens of the forget set)
    in main memory. The outcomes are those of the flagged neurons and of as many random ones per draw; where nothing is
    flagged nothing is changed, and every score is the one before.

    Args:
        original: The model before unlearning; needed.
        probe_examples: Examples per set on which neurons are flagged, over all devices, ≥ 1.
        alpha: False-positive rate of the flags, in (0, 1).
        draws: Draws of control neurons, ≥ 1.
        target: What is attributed: ``sequence``, ``length_normalised`` or ``log_probability``.
        method: Attribution method: a key of :data:`~lightning_ssiuu.attribution.methods.METHODS` or the import path of
            a callable; None: activation × gradient.

    Raises:
        UserError: If an option is outside its range.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> cpu = Devices("cpu")
        >>> attack = Ablation("tiny", probe_examples=4, draws=1)
        >>> outcomes = attack.run([Target("model", "tiny", cpu)], Facts(), "first_token", cpu)
        >>> [(outcome.variant, outcome.control, outcome.n_neurons, outcome.forget_score) for outcome in outcomes[:2]]
        [('original', False, 0, 100.0), ('original', True, 0, 100.0)]
        >>> Ablation(alpha=1.0)
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: attack.alpha: got 1.0, allowed: a false-positive rate in (0, 1)
    """

    paths: ClassVar[tuple[str, ...]] = ("original",)

    original: str | None = None
    probe_examples: int = 64
    alpha: float = 1e-3
    draws: int = 5
    target: TargetOfAttribution = "length_normalised"
    method: str | None = None

    def __post_init__(self) -> None:
        check_probes(self.probe_examples, self.alpha, "attack.")
        if not (isinstance(self.draws, int) and self.draws >= 1):
            raise UserError("attack.draws", self.draws, "a whole number ≥ 1")
        self._attribute = attribution_method(self.method, self.target, argument="attack.method")

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        if self.method is None:
            del settings["method"]  # as in files written before there was a choice
        return settings

    def check(self, data: UnlearningDataModule, score: str, devices: Devices) -> None:
        super().check(data, score, devices)
        if self.original is None:
            raise UserError(_ORIGINAL, None, "the model before unlearning: a directory, a hub id or another checkpoint")
        if SCORES[score].generates:
            forced = sorted(name for name, known in SCORES.items() if not known.generates)
            raise UserError("score", score, f"a teacher-forced score for attack Ablation: {forced}")
        if self.probe_examples < devices.n_ranks:
            raise UserError("attack.probe_examples", self.probe_examples, f"at least {devices.n_ranks}, one per device")
        resolve_models({_ORIGINAL: self.original})
        check_tokenizers({_ORIGINAL: self.original}, data)

    def run(self, targets: Sequence[Target], data: UnlearningDataModule, score: str, devices: Devices) -> list[Outcome]:
        original = Target(_ORIGINAL, str(self.original), devices)
        reference, _ = self._examined(original, data)
        plans = [self._plan(target, reference, data, score) for target in targets]
        needed = _union([columns for plan in plans for columns in (plan.flagged, *plan.controls)])
        recording = Recording(needed)
        if needed:
            model, tokenizer = original.load()
            with recording.of(model.hf):
                forget_score(model, tokenizer, data, score)
            del model  # before the next one is loaded
        outcomes: list[Outcome] = []
        for target, plan in zip(targets, plans, strict=True):
            outcomes += self._outcomes(target, plan, recording, data, score)
        return outcomes

    def _examined(
        self, target: Target, data: UnlearningDataModule, score: str | None = None
    ) -> tuple[dict[str, NeuronAttribution], float]:
        model, tokenizer = target.load()
        with naming(target.argument):  # an architecture without known neurons
            measured = attributions(model, data, self.probe_examples, self.target, self._attribute)
        return measured, 0.0 if score is None else forget_score(model, tokenizer, data, score)

    def _plan(
        self, target: Target, reference: dict[str, NeuronAttribution], data: UnlearningDataModule, score: str
    ) -> _Plan:
        changed, before = self._examined(target, data, score)
        diagnosis = diagnose(Examined({}, reference), Examined({}, changed), self.alpha)
        sites = reference["forget"].sites
        flagged: list[Neuron] = [(neuron.layer, neuron.module, neuron.index) for neuron in diagnosis.flagged]
        controls = [output_columns(sites, control_neurons(sites, flagged, draw)) for draw in range(self.draws)]
        return _Plan(before, output_columns(sites, flagged), controls, len(flagged))

    def _outcomes(
        self, target: Target, plan: _Plan, recording: Recording, data: UnlearningDataModule, score: str
    ) -> Iterator[Outcome]:
        model: AnswerModel | None = None
        if plan.n_neurons:
            model, tokenizer = target.load()
        for variant, values in (("original", recording), ("zero", None)):
            for number, columns in enumerate([plan.flagged, *plan.controls]):
                after = plan.before
                if model is not None:
                    with patched(model.hf, columns, values):
                        after = forget_score(model, tokenizer, data, score)
                more = {"seed": max(number - 1, 0), "control": number > 0, "n_neurons": plan.n_neurons}
                yield self.outcome(target, data, score, plan.before, after, variant, **more)


def _union(several: Sequence[Columns]) -> Columns:
    names = dict.fromkeys(name for columns in several for name in columns)
    # unique sorts, which finding a neuron in the recording relies on
    return {name: torch.cat([columns[name] for columns in several if name in columns]).unique() for name in names}
