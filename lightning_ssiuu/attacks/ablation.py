"""Undo the flagged neurons and nothing else: if the answers return, they were hidden and not erased.

The causal check of a diagnosis: neurons that unlearning turned against the answers, by their influence
(arXiv 2509.22263), are put back to the activations they had before it, token by token, or set to zero. Random neurons
of the same kinds are the control. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_ssiuu.attacks.base import Attack, Outcome, Target, forget_score
from lightning_ssiuu.attribution.activation_gradient import NeuronAttribution
from lightning_ssiuu.attribution.diagnosis import Examined, attributions, diagnose
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.evaluation.runs import check_tokenizers, resolve_models
from lightning_ssiuu.evaluation.scores import SCORES
from lightning_ssiuu.models.answers import TARGETS, AnswerModel
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
    """Where neurons stand in the outputs of their modules; those of a shared projection come together.

    Example:
        >>> site = NeuronSite("attn_k", 0, "qkv", 2, torch.tensor([4, 5]))
        >>> output_columns([site], [(0, "attn_k", 1), (0, "attn_k", 0)])
        {'qkv': tensor([4, 5])}
    """
    by_key: dict[tuple[int, str], NeuronSite] = {site.key: site for site in sites}
    found: dict[str, set[int]] = {}
    for layer, kind, index in neurons:
        site = by_key[layer, kind]
        column = index if site.columns is None else int(site.columns[index])
        found.setdefault(site.module_name, set()).add(column)
    return {name: torch.tensor(sorted(columns)) for name, columns in found.items()}


def control_neurons(sites: Sequence[NeuronSite], flagged: Iterable[Neuron], seed: int) -> list[Neuron]:
    """As many random neurons of each kind as are flagged, none of them flagged, from all layers.

    Args:
        sites: The model's.
        flagged: The flagged neurons.
        seed: Of the draw.

    Returns:
        The drawn neurons; fewer than flagged where a kind has no more that are not.

    Example:
        >>> sites = [NeuronSite("mlp_up", layer, f"up{layer}", 2) for layer in range(2)]
        >>> drawn = control_neurons(sites, [(0, "mlp_up", 1)], seed=0)
        >>> len(drawn), (0, "mlp_up", 1) in drawn
        (1, False)
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
    """Activations of some neurons in every forward pass of an evaluation, in main memory.

    Args:
        columns: Which.
        passes: By module, ``[B, L, n]`` for every pass, in the order of the passes.

    Example:
        >>> layer = nn.Sequential(nn.Linear(1, 2))
        >>> recording = Recording({"0": torch.tensor([1])})
        >>> with recording.of(layer):
        ...     y = layer(torch.ones(1, 1, 1))
        >>> bool((recording.passes["0"][0] == y[..., 1:]).all())
        True
    """

    columns: Columns
    passes: dict[str, list[Tensor]] = field(default_factory=dict)

    @contextmanager
    def of(self, hf: nn.Module) -> Iterator[None]:
        """Record whatever forward passes are made inside."""

        def watch(name: str) -> Callable[..., None]:
            columns, kept = self.columns[name], self.passes.setdefault(name, [])

            def hook(_module: nn.Module, _args: object, output: Tensor) -> None:
                kept.append(output.detach()[..., columns.to(output.device)].cpu())

            return hook

        with _hooked(hf, {name: watch(name) for name in self.columns}):
            yield


@contextmanager
def patched(hf: nn.Module, columns: Columns, recording: Recording | None = None) -> Iterator[None]:
    """Inside, some neurons have recorded activations instead of their own, or are zero.

    Args:
        hf: The transformers model.
        columns: Which neurons.
        recording: Holds at least these, for the same passes in the same order; None: zero.

    Example:
        >>> layer = nn.Sequential(nn.Linear(1, 2))
        >>> with patched(layer, {"0": torch.tensor([0])}):
        ...     layer(torch.ones(1, 1))[0, 0].item()
        0.0
    """

    def change(name: str) -> Callable[..., Tensor]:
        own = columns[name]
        values = None if recording is None else iter(recording.passes[name])
        places = None if recording is None else torch.searchsorted(recording.columns[name], own)

        def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            output = output.clone()
            output[..., own.to(output.device)] = 0 if values is None else next(values)[..., places].to(output)
            return output

        return hook

    with _hooked(hf, {name: change(name) for name in columns}):
        yield


@contextmanager
def _hooked(hf: nn.Module, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    handles = []
    try:
        for name, hook in hooks.items():
            handles.append(hf.get_submodule(name).register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Plan:
    """What is to be done to one model."""

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

    Raises:
        UserError: If an option is outside its range.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> here = Devices("cpu")
        >>> attack = Ablation("tiny", probe_examples=4, draws=1)
        >>> outcomes = attack.run([Target("model", "tiny", here)], Facts(), "first_token", here)
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

    def __post_init__(self) -> None:
        for name, value in (("probe_examples", self.probe_examples), ("draws", self.draws)):
            if not (isinstance(value, int) and value >= 1):
                raise UserError(f"attack.{name}", value, "a whole number ≥ 1")
        if not 0 < self.alpha < 1:
            raise UserError("attack.alpha", self.alpha, "a false-positive rate in (0, 1)")
        if self.target not in TARGETS:
            raise UserError("attack.target", self.target, f"one of {list(TARGETS)}")

    def check(self, data: UnlearningDataModule, score: str, devices: Devices) -> None:
        super().check(data, score, devices)
        if self.original is None:
            raise UserError(_ORIGINAL, None, "the model before unlearning: a directory, a hub id or another checkpoint")
        if SCORES[score].generates:
            forced = sorted(name for name, given in SCORES.items() if not given.generates)
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
            _record(original, recording, data, score)
        return [
            outcome
            for target, plan in zip(targets, plans, strict=True)
            for outcome in self._outcomes(target, plan, recording, data, score)
        ]

    def _examined(
        self, target: Target, data: UnlearningDataModule, score: str | None = None
    ) -> tuple[dict[str, NeuronAttribution], float]:
        model, tokenizer = target.load()
        with naming(target.argument):  # an architecture without known neurons
            measured = attributions(model, data, self.probe_examples, self.target)
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


def _record(original: Target, recording: Recording, data: UnlearningDataModule, score: str) -> None:
    model, tokenizer = original.load()
    with recording.of(model.hf):
        forget_score(model, tokenizer, data, score)


def _union(several: Sequence[Columns]) -> Columns:
    names = dict.fromkeys(name for columns in several for name in columns)
    # unique sorts, which finding a neuron in the recording relies on
    return {name: torch.cat([columns[name] for columns in several if name in columns]).unique() for name in names}
