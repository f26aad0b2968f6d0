"""Undo the flagged neurons and nothing else: if the answers return, they were hidden and not erased.

The causal check of a diagnosis: neurons that unlearning turned against the answers, by their influence
(arXiv 2509.22263), are put back to the activations they had before it, token by token, or set to zero. Random neurons
of the same kinds are the control. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssiuu.attacks.base import Outcome, forget_score, load_alone, model_name
from lightning_ssiuu.attribution.activation_gradient import NeuronAttribution
from lightning_ssiuu.attribution.diagnosis import Examined, attributions, diagnose
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.evaluation.runs import check_tokenizers, resolve_models
from lightning_ssiuu.evaluation.scores import SCORES
from lightning_ssiuu.models.answers import TARGETS, AnswerModel, Target
from lightning_ssiuu.models.architectures import NeuronSite
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError, naming

#: A neuron: layer, kind of site, place in the site.
Neuron = tuple[int, str, int]
#: Columns of a module's output, ascending, by the module's dotted name.
Columns = dict[str, Tensor]
_ORIGINAL = "ablation.original"


@dataclass
class Ablation:
    """Options of the ablation attack.

    Args:
        original: The model before unlearning; needed.
        probe_examples: Examples per set on which neurons are flagged, over all devices, ≥ 1.
        alpha: False-positive rate of the flags, in (0, 1).
        draws: Draws of control neurons, ≥ 1.
        target: What is attributed: ``sequence``, ``length_normalised`` or ``log_probability``.

    Raises:
        UserError: If an option is outside its range.

    Example:
        >>> Ablation(alpha=1.0)
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: ablation.alpha: got 1.0, allowed: a false-positive rate in (0, 1)
    """

    original: str | None = None
    probe_examples: int = 64
    alpha: float = 1e-3
    draws: int = 5
    target: Target = "length_normalised"

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value in (("probe_examples", self.probe_examples), ("draws", self.draws)):
            if not (isinstance(value, int) and value >= 1):
                raise UserError(f"ablation.{name}", value, "a whole number ≥ 1")
        if not 0 < self.alpha < 1:
            raise UserError("ablation.alpha", self.alpha, "a false-positive rate in (0, 1)")
        if self.target not in TARGETS:
            raise UserError("ablation.target", self.target, f"one of {list(TARGETS)}")


def check_ablation(data: UnlearningDataModule, score: str, where: Devices, options: Ablation) -> str:
    """Check what the attack needs before a model is loaded.

    Returns:
        The original model's checkpoint.

    Raises:
        UserError: No original model, one with another tokenizer, a score that generates text, or more devices than
            probe examples.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> check_ablation(Facts(), "rouge_l", Devices("cpu"), Ablation("tiny"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: score: got 'rouge_l', allowed: a teacher-forced score for kind ablation...
    """
    if options.original is None:
        raise UserError(_ORIGINAL, None, "the model before unlearning: a directory, a hub id or another checkpoint")
    if SCORES[score].generates:
        forced = sorted(name for name, one in SCORES.items() if not one.generates)
        raise UserError("score", score, f"a teacher-forced score for kind ablation: {forced}")
    if options.probe_examples < where.n_ranks:
        raise UserError("ablation.probe_examples", options.probe_examples, f"at least {where.n_ranks}, one per device")
    resolve_models({_ORIGINAL: options.original})
    check_tokenizers({_ORIGINAL: options.original}, data)
    return options.original


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
        mine = columns[name]
        values = None if recording is None else iter(recording.passes[name])
        places = None if recording is None else torch.searchsorted(recording.columns[name], mine)

        def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            output = output.clone()
            where = mine.to(output.device)
            output[..., where] = 0 if values is None else next(values)[..., places].to(output)
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


def ablation_attack(
    models: Mapping[str, str], data: UnlearningDataModule, score: str, where: Devices, options: Ablation
) -> list[Outcome]:
    """Put flagged neurons back to what they were before unlearning, or to zero, and score the forget set again.

    Neurons are flagged by :func:`~lightning_ssiuu.attribution.influence.spurious_neurons` between ``options.original``
    and each model. The original model's activations are recorded first, on the same tokens, for every forward pass the
    score makes; only one model is in memory at a time, the recording (flagged and control neurons × tokens of the
    forget set) in main memory.

    Args:
        models: Checkpoint by the name of the argument it was given for.
        data: Whose forget set is scored, and whose forget and retain set neurons are flagged by.
        score: A teacher-forced score's name.
        where: Launched devices.
        options: The original model, and how neurons are flagged and drawn.

    Returns:
        For each model and each variant, ``"original"`` and ``"zero"``, the outcome of the flagged neurons and one
        control per draw. Where nothing is flagged nothing is changed, and every score is the one before.

    Raises:
        UserError: What :func:`check_ablation` and loading raise.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> options = Ablation("tiny", probe_examples=4, draws=1)
        >>> found = ablation_attack({"model": "tiny"}, Facts(), "first_token", Devices("cpu"), options)
        >>> [(one.variant, one.control, one.n_neurons, one.forget_score) for one in found[:2]]
        [('original', False, 0, 100.0), ('original', True, 0, 100.0)]
    """
    original = check_ablation(data, score, where, options)
    reference, _ = _examined(_ORIGINAL, original, data, where, options)
    plans = {
        name: _plan(name, checkpoint, reference, data, score, where, options) for name, checkpoint in models.items()
    }
    needed = _union([columns for plan in plans.values() for columns in (plan.flagged, *plan.controls)])
    recording = _recorded(original, needed, data, score, where)
    return [
        outcome
        for argument, checkpoint in models.items()
        for outcome in _outcomes(argument, checkpoint, plans[argument], recording, data, score, where)
    ]


def _examined(
    argument: str,
    checkpoint: str,
    data: UnlearningDataModule,
    where: Devices,
    options: Ablation,
    score: str | None = None,
) -> tuple[dict[str, NeuronAttribution], float]:
    model, tokenizer = load_alone(argument, checkpoint, where)
    with naming(argument):  # an architecture without known neurons
        measured = attributions(model, data, options.probe_examples, options.target)
    return measured, 0.0 if score is None else forget_score(model, tokenizer, data, score)


def _plan(
    argument: str,
    checkpoint: str,
    reference: dict[str, NeuronAttribution],
    data: UnlearningDataModule,
    score: str,
    where: Devices,
    options: Ablation,
) -> _Plan:
    changed, before = _examined(argument, checkpoint, data, where, options, score)
    diagnosis = diagnose(Examined({}, reference), Examined({}, changed), options.alpha)
    sites = reference["forget"].sites
    flagged: list[Neuron] = [(neuron.layer, neuron.module, neuron.index) for neuron in diagnosis.flagged]
    controls = [output_columns(sites, control_neurons(sites, flagged, draw)) for draw in range(options.draws)]
    return _Plan(before, output_columns(sites, flagged), controls, len(flagged))


def _union(several: Sequence[Columns]) -> Columns:
    names = dict.fromkeys(name for columns in several for name in columns)
    # unique sorts, which finding a neuron in the recording relies on
    return {name: torch.cat([columns[name] for columns in several if name in columns]).unique() for name in names}


def _recorded(original: str, columns: Columns, data: UnlearningDataModule, score: str, where: Devices) -> Recording:
    recording = Recording(columns)
    if columns:
        model, tokenizer = load_alone(_ORIGINAL, original, where)
        with recording.of(model.hf):
            forget_score(model, tokenizer, data, score)
    return recording


def _outcomes(
    argument: str,
    checkpoint: str,
    plan: _Plan,
    recording: Recording,
    data: UnlearningDataModule,
    score: str,
    where: Devices,
) -> list[Outcome]:
    model: AnswerModel | None = None
    if plan.n_neurons:
        model, tokenizer = load_alone(argument, checkpoint, where)
    outcomes, n_scored = [], len(data.splits.forget)
    for variant in ("original", "zero"):
        values = recording if variant == "original" else None
        for number, columns in enumerate([plan.flagged, *plan.controls]):
            after = plan.before
            if model is not None:
                with patched(model.hf, columns, values):
                    after = forget_score(model, tokenizer, data, score)
            control, seed = number > 0, max(number - 1, 0)
            figures = (seed, n_scored, plan.before, after, control, plan.n_neurons, score)
            outcomes.append(Outcome(model_name(argument), "ablation", variant, *figures))
    return outcomes
