"""What a run of ``fit`` will need per device, found out before anything is loaded.

The run's own code is taken through two steps on tensors without memory (:mod:`lightning_ssiuu.utils.simulation`): its
model, objective, regulariser, optimiser, strategy and callbacks, with the largest batch of its own data.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.utils._pytree import tree_leaves

from lightning_ssiuu.callbacks import ForgetThresholdStopping, NeuronAttributionCallback, SavePretrained
from lightning_ssiuu.callbacks.walk_back import WayBack
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.datamodules.largest import Size, evaluation_batch, training_batch
from lightning_ssiuu.evaluation.elicitation import relearned
from lightning_ssiuu.evaluation.predictions import Predictions
from lightning_ssiuu.evaluation.scorer import Scorer, untouched
from lightning_ssiuu.evaluation.scores import SCORES
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import neuron_sites
from lightning_ssiuu.models.export import plain_state_dict
from lightning_ssiuu.models.meta import blueprint, give_memory, is_packed
from lightning_ssiuu.objectives import UnlearningModule
from lightning_ssiuu.training.fsdp import FLOATS_ONLY, shard
from lightning_ssiuu.training.reference import LiveReference
from lightning_ssiuu.utils.errors import UserError, naming
from lightning_ssiuu.utils.simulation import Simulation
from lightning_ssiuu.utils.terminal import text_console

#: What memory is used for, in the order in which it is shown, and how that is called.
USES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimiser states",
    "attribution": "attribution (g, A)",
    "buckets": "buckets of gradients",
    "activations": "activations and temporaries",
}
# bitsandbytes keeps smaller states where the weights are, of a paged optimiser too.
_PAGED_FROM = 100_000
_BATCHES = 2000  # looked through for the largest


@dataclass(frozen=True)
class MemoryEstimate:
    """What one device needs, in bytes, at the worst moment of a run.

    ``uses`` are the bytes at that moment by the keys of :data:`USES`, ``by_phase`` those at the worst moment of each
    phase, ``paged`` those of optimiser states that bitsandbytes pages out to the host's memory, not part of the total.
    """

    device: str
    n_ranks: int
    phase: str
    uses: Mapping[str, int]
    by_phase: Mapping[str, int]
    paged: int = 0

    @property
    def total(self) -> int:
        return sum(self.uses.values())


def estimate_memory(
    module: UnlearningModule, data: UnlearningDataModule, trainer: L.Trainer | None = None
) -> MemoryEstimate:
    """What ``trainer.fit(module, data)`` will need per device. Nothing is loaded, trained or written.

    Args:
        module: An objective whose model is not loaded yet; not changed.
        data: Its data; is set up (read and tokenised).
        trainer: Has device, ranks, strategy, precision, gradient accumulation and callbacks; not started. None takes a
            Trainer with its defaults.

    Raises:
        UserError: If the strategy or the objective cannot be simulated, or loading would refuse the configuration.
        ValueError: If the module has its model already.

    Example:
        >>> from lightning_ssiuu import Facts, GradientDifference
        >>> trainer = L.Trainer(accelerator="cpu", logger=False, barebones=True)
        >>> estimate = estimate_memory(GradientDifference(checkpoint="tiny"), Facts(eval_batch_size=4), trainer)
        >>> estimate.uses["weights"] // 10**5, estimate.phase
        (36, 'training step')
    """
    if module.is_loaded:
        raise ValueError("module: its model is loaded already; estimate before configure_model()")
    trainer = trainer or L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    run = _Run(copy.deepcopy(module), data, trainer)
    try:
        group = _pretended_ranks(run.n_ranks) if run.distributed else nullcontext()
        with isolate_rng(), warnings.catch_warnings(), group, _experts_of_any_type():
            warnings.simplefilter("ignore")  # on what numbers that are all 1 look like
            return run.estimate()
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        allowed = f"one whose tensors' shapes follow from its batches' ({type(error).__name__}: {error})"
        raise UserError("estimate_memory", type(module).__name__, " ".join(allowed.split())) from error


class _Run:
    # A run as it would be, on tensors without memory.

    def __init__(self, module: UnlearningModule, data: UnlearningDataModule, trainer: L.Trainer) -> None:
        self.module, self.data, self.trainer = module, data, trainer
        self.strategy, self.n_ranks = trainer.strategy, trainer.world_size
        self.sharded = isinstance(self.strategy, ModelParallelStrategy)
        self.distributed = self.sharded or isinstance(self.strategy, DDPStrategy)  # also over a single device
        if not (self.distributed or isinstance(self.strategy, SingleDeviceStrategy)):
            allowed = "a single device, DDPStrategy or ModelParallelStrategy with --estimate-memory"
            raise UserError("trainer.strategy", type(self.strategy).__name__, allowed)
        self.device = self.strategy.root_device
        self.simulation = Simulation(self.device, granularity=512 if self.device.type == "cuda" else 1)
        module.torch_compile = None  # what is compiled needs no more
        module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]  # there is no Trainer to log to

    def estimate(self) -> MemoryEstimate:
        model = self._blueprint()
        self.config = model.hf.config
        limit = self.trainer.max_steps * self.trainer.accumulate_grad_batches
        n_batches = min(limit, _BATCHES) if limit > 0 else _BATCHES
        n_epochs = self.trainer.max_epochs if (self.trainer.max_epochs or -1) > 0 else None
        batch = training_batch(self.data, self._cost, self.n_ranks, n_batches, n_epochs)
        with self.simulation:
            self._load(model)
            self._refer(move_data_to_device(batch, self.device))
            ways = self._ways_back()
            self._train(batch)
            self._elicit(batch)
            for way in ways:
                with self.simulation.phase("walking back"):
                    way.updates(self.module)[0].put(1.0)
            self._attribute()
            self._score()
            self._save()
        peaks = {name: self.simulation.peak(name) for name in self.simulation.phases}
        by_phase = {
            name: peak.total - peak.by_tag.get("paged", 0) + _workspace(self.device) for name, peak in peaks.items()
        }
        phase = max(by_phase, key=by_phase.__getitem__)
        uses = {use: peaks[phase].by_tag.get(use, 0) for use in USES}
        uses["activations"] = 0
        uses["activations"] = by_phase[phase] - sum(uses.values())
        paged = peaks[phase].by_tag.get("paged", 0)
        return MemoryEstimate(self.device.type, self.n_ranks, phase, uses, by_phase, paged)

    def _blueprint(self) -> AnswerModel:
        if self.sharded and self.module.quantization is not None:
            raise UserError("quantization", self.module.quantization, FLOATS_ONLY)
        with self.trainer.precision_plugin.module_init_context():
            module, dtype = self.module, self.module.source.torch_dtype()
            hf = blueprint(module.checkpoint, dtype, module.quantization, module.architecture)
        if self.module.lora is not None:
            self.module.lora.attach(hf)
        return AnswerModel(hf)

    def _cost(self, size: Size) -> float:
        # About how many numbers a forward pass keeps, to tell batches apart.
        width, inner = self.config.hidden_size, getattr(self.config, "intermediate_size", 4 * self.config.hidden_size)
        per_token = self.config.num_hidden_layers * (12 * width + 4 * inner)
        return per_token * size.tokens + 3 * self.config.vocab_size * size.labels

    def _load(self, model: AnswerModel) -> None:
        with self.simulation.phase("loading"):
            give_memory(model, self.device)
        if self.sharded:
            shard(model, dist.device_mesh.init_device_mesh(self.device.type, (self.n_ranks,)))
        self.module.adopt(model, self.data.tokenizer)
        self.module.train()
        self.simulation.tag_rest("weights")

    def _refer(self, batch: Mapping[str, Any]) -> None:
        # Give the losses an original model to compare with: live, or tensors in place of values read from the disk.
        module = self.module
        each: Any
        for each in (module, *module._backbone):
            if unaware := getattr(each, "unaware", None):
                with self.simulation.phase("unaware model"), naming("unaware"), torch.no_grad():
                    give_memory(other := AnswerModel(blueprint(unaware, each.unaware_dtype, None)), self.device)
                    other(*(batch["forget"][name] for name in ("input_ids", "attention_mask", "labels")))
        if not (observations := module.references()):
            return
        second = module.lora is None and module.reference == "second_model"
        model = module.model
        if second:
            give_memory(model := self._blueprint(), self.device)
            model.requires_grad_(False).eval()
            self.simulation.tag_rest("weights")
        reference: Any = LiveReference(model, observations)
        if module.lora is None and not second:
            with self.simulation.phase("reference"):
                known = {name: reference(name, batch[name.partition("/")[0]]) for name in observations}
            shapes = {name: (values.shape, values.dtype) for name, values in known.items()}
            del known
            reference = lambda name, _: torch.empty(shapes[name][0], dtype=shapes[name][1], device=self.device)  # noqa: E731
        for objective in (module, *module._backbone):
            objective._reference = reference

    def _ways_back(self) -> list[WayBack]:
        asked = [each.walk_back for each in self._callbacks(ForgetThresholdStopping) if each.threshold is not None]
        if ways := [WayBack(options, self.module, resumed=False) for options in filter(None, asked)]:
            self.simulation.tag_rest("weights")
        return ways

    def _train(self, batch: Mapping[str, Any]) -> None:
        module, precision = self.module, self.trainer.precision_plugin
        step: Callable[..., Tensor] = module.training_step
        if isinstance(self.strategy, DDPStrategy):
            step = _distributed(module, self.strategy)
        configured = module.configure_optimizers()
        optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
        is_paged = getattr(optimizer, "is_paged", False) and self.device.type == "cuda"
        optimizer.is_paged = False  # paged memory comes from CUDA itself and not through torch
        with self.simulation.phase("training step"):
            for _ in range(2):  # the second has what the first leaves: gradients, optimiser states, anchor
                for number in range(min(self.trainer.accumulate_grad_batches, 2)):
                    with precision.train_step_context():
                        loss = step(move_data_to_device(batch, self.device), number)
                    if number == 0:
                        optimizer.zero_grad()  # Lightning's order: the old gradients outlive the forward pass
                    loss.backward()
                    del loss
                self.simulation.tag([p.grad for p in module.parameters()], "gradients")
                self.simulation.tag(_state_of(module.regularizer), "attribution")
                module.on_before_optimizer_step(optimizer)
                optimizer.step()
                self.simulation.tag(_state_of(module.regularizer), "attribution")
                for tensor in tree_leaves([list(state.values()) for state in optimizer.state.values()]):
                    large = isinstance(tensor, Tensor) and tensor.numel() >= _PAGED_FROM
                    self.simulation.tag(tensor, "paged" if is_paged and large else "optimizer")
        self.simulation.tag_rest("buckets" if isinstance(self.strategy, DDPStrategy) else "activations")
        self.held = step, optimizer  # to the end of the run

    def _elicit(self, batch: Mapping[str, Any]) -> None:
        adversaries = [callback.elicited for callback in self._callbacks(ForgetThresholdStopping)]
        adversaries += [each.elicited for each in self._callbacks(NeuronAttributionCallback) if each.probe_examples]
        for adversary in filter(None, adversaries if "forget" in batch else ()):
            rows = -(-adversary.batch_size // self.n_ranks)
            part = {name: value[:rows] for name, value in batch["forget"].items() if isinstance(value, Tensor)}
            look = relearned(self.module.model, replace(adversary, steps=2), [part, part])
            with self.simulation.phase("elicited look"), look:
                pass

    def _attribute(self) -> None:
        model = self.module.model
        for callback in self._callbacks(NeuronAttributionCallback):
            if not callback.probe_examples:
                continue
            sites = neuron_sites(model.hf)
            for split in ("forget", "retain"):
                n_examples = -(-callback.probe_examples // self.n_ranks)
                batch = evaluation_batch(self.data, split, self._cost, n_examples)
                part = {name: batch[split][name] for name in ("input_ids", "attention_mask", "labels")}
                with self.simulation.phase("attribution"), untouched(model):
                    callback.method(model, [part], sites)

    def _score(self) -> None:
        model = self.module.model
        stopping = [callback.score for callback in self._callbacks(ForgetThresholdStopping) if callback.threshold]
        for split in self.data.eval_splits:
            part = move_data_to_device(evaluation_batch(self.data, split, self._cost)[split], self.device)
            names = Scorer(model, self.module.tokenizer, self.module.scores).names(part)
            with untouched(model), torch.no_grad():
                evaluated = Predictions(model, self.module.tokenizer, part)
                for name in [*names, *stopping]:
                    if (score := SCORES[name]).generates:
                        with self.simulation.phase("generation"):
                            self._generate(part[score.needs] if score.needs else part, len(part["input_ids"]))
                    else:
                        with self.simulation.phase("scoring"):
                            score.measure(evaluated)

    def _generate(self, part: Mapping[str, Any], rows: int) -> None:
        # A loop that ends by what is generated cannot be gone through without values: one pass and a full cache.
        part = {name: part[name][:rows] for name in ("input_ids", "attention_mask", "labels")}
        width = part["input_ids"].shape[1]
        n_labels = int((part["labels"] != -100).sum(1).max())
        longest = width + max(n_labels, min(200, 2 * n_labels))  # a passage is as long as it is
        heads = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        size = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        n_tensors = 2 * self.config.num_hidden_layers + 1  # a layer's grown cache is made beside the old one
        shape, dtype = (rows, heads, longest, size), self.module.model.hf.dtype
        cache = [torch.empty(shape, dtype=dtype, device=self.device) for _ in range(n_tensors)]
        self.module.model(**part)
        del cache

    def _save(self) -> None:
        hf = self.module.model.hf
        if not any(callback.folder for callback in self._callbacks(SavePretrained)):
            return
        with self.simulation.phase("saving"):
            if not (packed := [module for module in hf.modules() if is_packed(module)]):
                plain_state_dict(hf)
                return
            shapes = [(module.out_features, module.in_features) for module in packed]
            plain = [torch.empty(shape, dtype=hf.dtype, device="cpu") for shape in shapes]
            largest = max(shapes, key=lambda shape: shape[0] * shape[1])
            working = [torch.empty(largest, device=self.device) for _ in range(3)]  # unpacked, adapter, their sum
            del plain, working

    def _callbacks(self, kind: type[Any]) -> list[Any]:
        return [callback for callback in self.trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def _distributed(module: UnlearningModule, strategy: DDPStrategy) -> Callable[..., Any]:
    def reduced(_, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations, which are strings here
        future: Any = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped = nn.parallel.DistributedDataParallel(module, **{**strategy._ddp_kwargs, "init_sync": False})
    wrapped.register_comm_hook(None, reduced)  # a pretended group's own reduction has no result
    return partial(strategy._forward_redirection, wrapped, module, "training_step")


@contextmanager
def _pretended_ranks(n_ranks: int) -> Iterator[None]:
    # Inside, this process is the first of so many, and what it sends comes to nothing.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _experts_of_any_type() -> Iterator[None]:
    # torch simulates the grouped product of experts in bfloat16 alone. What transformers puts in its place, where that
    # product is missing, needs the same memory.
    moe: Any = sys.modules.get("transformers.integrations.moe")
    can_use = getattr(moe, "_can_use_grouped_mm", None)
    try:
        if can_use is not None:
            moe._can_use_grouped_mm = lambda *_, **__: False
        yield
    finally:
        if can_use is not None:
            moe._can_use_grouped_mm = can_use


def _state_of(regularizer: Any) -> list[Any]:
    return [] if regularizer is None else list(vars(regularizer).values())


def _workspace(device: torch.device) -> int:
    # What cuBLAS takes through torch's allocator: once for the forward and once for the backward thread.
    if device.type != "cuda":
        return 0
    return 2 * (32 << 20 if torch.cuda.get_device_capability(device) >= (9, 0) else 8_519_680)


def print_estimate(estimate: MemoryEstimate, console: Console | None = None) -> None:
    """Print an estimate as a table, in MB (10⁶ bytes)."""
    console = console or text_console()
    what = "process" if estimate.device == "cpu" else "device"
    console.print(f"Memory per {what}, {estimate.n_ranks} on {estimate.device}, at the worst moment ({estimate.phase})")
    table = Table(box=None, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for use, text in USES.items():
        if 1000 * (size := estimate.uses.get(use, 0)) > estimate.total:
            table.add_row(text, _megabytes(size))
    table.add_row("total", _megabytes(estimate.total))
    console.print(table)
    phases = ", ".join(f"{name} {_megabytes(size)}" for name, size in estimate.by_phase.items())
    console.print(f"Worst moment of each phase: {phases}", soft_wrap=True)
    if estimate.paged:
        console.print(f"Paged optimiser states, in the host's memory: {_megabytes(estimate.paged)}")
    if estimate.device == "cpu":
        console.print("The process itself takes about 550 MB more (libraries).")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
