"""Run torch code without memory for its floating-point tensors, and log how much memory it would have needed when."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only

_aten = torch.ops.aten
# Masks, indices and labels: small, and their values decide how large other tensors become.
_REAL = (torch.bool, torch.int32, torch.int64)
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)


@dataclass(frozen=True)
class Peak:
    """The most bytes in use during a phase, in all and by their tag (the untagged ones under ``""``)."""

    total: int
    by_tag: Mapping[str, int]


class Simulation(TorchDispatchMode):
    """Inside this context floating-point tensors have shapes and no memory; integers and booleans are real.

    A training step then takes the same path as in a real run (attention kernel, number of labels) and costs neither
    memory nor arithmetic. A number read from a tensor without values (``.item()``) is 1, a mask without values selects
    everything. Every storage on ``device`` that comes or goes is logged, temporaries included, its size rounded up to
    a multiple of ``granularity`` bytes (512 in CUDA's allocator); what a kernel allocates for itself cannot be seen.
    """

    def __init__(self, device: torch.device, granularity: int = 1) -> None:
        super().__init__()
        self.device, self.granularity = device, granularity
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._sizes: list[int] = []  # bytes of every storage there ever was
        self._events: list[int] = []  # the number of a storage that came, or ~number of one that went
        self._living: dict[int, tuple[int, Any]] = {}  # by address: number, and what tells of the end
        self._tags: dict[int, str] = {}
        self.phases: dict[str, list[range]] = {}

    def __enter__(self) -> Simulation:
        self._fake.__enter__()
        super().__enter__()
        self._theirs = _fsdp_param.free_storage, _fsdp_param.alloc_storage
        _fsdp_param.free_storage, _fsdp_param.alloc_storage = self._free, self._allocate
        return self

    def __exit__(self, *error: Any) -> None:
        _fsdp_param.free_storage, _fsdp_param.alloc_storage = self._theirs
        super().__exit__(*error)
        self._fake.__exit__(*error)

    # FSDP2 frees a gathered weight, and makes room for it again, by resizing its storage: no operation shows that.

    def _free(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.size():
            if (known := self._living.pop(storage._cdata, None)) is not None:
                self._events.append(~known[0])
            storage.resize_(0)

    def _allocate(self, tensor: Tensor) -> None:
        storage, size = tensor.untyped_storage(), tensor.numel() * tensor.itemsize
        if storage.size() != size:
            storage.resize_(size)
            self._living.pop(storage._cdata, None)
            self._log(tensor)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Give what happens inside a name, which may be used again."""
        start = len(self._events)
        yield
        self.phases.setdefault(name, []).append(range(start, len(self._events) + 1))

    def tag(self, values: Any, name: str) -> None:
        """Say what the storages of the tensors in ``values`` are used for, from their beginning on."""
        for tensor in tree_leaves(values):
            for storage in _storages(tensor):
                if storage._cdata in self._living:
                    self._tags[self._living[storage._cdata][0]] = name

    def tag_rest(self, name: str) -> None:
        """Say what all other storages that are alive now are used for."""
        for number, _ in self._living.values():
            self._tags.setdefault(number, name)

    def peak(self, phase: str) -> Peak:
        """The peak over all that was done under a name."""
        steps = [self._sizes[event] if event >= 0 else -self._sizes[~event] for event in self._events]
        totals = [0, *accumulate(steps)]
        moment = max((index for span in self.phases[phase] for index in span), key=totals.__getitem__)
        past = self._events[:moment]
        gone = {~event for event in past if event < 0}
        by_tag: Counter[str] = Counter()
        for number in (event for event in past if event >= 0 and event not in gone):
            by_tag[self._tags.get(number, "")] += self._sizes[number]
        return Peak(totals[moment], dict(by_tag))

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        if any(is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, FakeTensor) for tensor in tensors):
            return NotImplemented  # shards: what is done with their insides comes by here again
        if _accumulates(func, tensors):
            result = _aten.add_.Tensor(*args)
        else:
            result = self._run(func, args, kwargs, tensors)
        for tensor in _tensors(result):
            self._log(tensor)
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        if not tensors:  # makes something new
            result = func(*args, **kwargs)
            is_real = all(tensor.dtype in _REAL for tensor in _tensors(result))
            return self._really(func, args, kwargs) if is_real else result
        if all(tensor.dtype in _REAL and not isinstance(tensor, FakeTensor) for tensor in tensors):
            return tree_map_only(Tensor, _without_values, self._really(func, args, kwargs))
        if func is _aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if func is _aten.nonzero.default:
            return self._really(func, (_everything(args[0]),), {})
        if func in _INDEXING:
            indices = [part for index in args[1] for part in self._positions(index)]
            args = (args[0], indices, *args[2:])
        if func.namespace == "bitsandbytes":
            return self._packed(func, args, kwargs)
        return func(*args, **kwargs)

    def _packed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Some operations of bitsandbytes cannot do without values, and some hide large temporaries.
        name = func._schema.name.removeprefix("bitsandbytes::")
        if name == "int8_vectorwise_quant":
            return func(*args[:1])  # no threshold: how many columns lie above it only values tell, and they are few
        if name == "int8_mixed_scaled_mm":
            values, packed, weight = args[:3]
            shape = (*packed.shape[:-1], weight.shape[0])
            self._come_and_go(2 * 4 * math.prod(shape))  # the product in 32-bit integers, and in floats
            return values.new_empty(shape), values.new_empty(0)
        if name == "gemm_4bit":
            self._come_and_go(math.prod(args[2]) * args[0].element_size())  # the weight, unpacked
        return func(*args, **kwargs)

    def _positions(self, index: Tensor | None) -> Sequence[Tensor | None]:
        # How many a mask selects is not known from its shape.
        if index is None or index.dtype != torch.bool:
            return [index]
        with unset_fake_temporarily():
            mask = _everything(index) if isinstance(index, FakeTensor) else index
            return mask.nonzero(as_tuple=True)

    def _really(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _come_and_go(self, size: int) -> None:
        number = len(self._sizes)
        self._sizes.append(size)
        self._events += [number, ~number]

    def _log(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._living or tensor.device.type != self.device.type:
            return
        number = len(self._sizes)
        self._sizes.append(-(-storage.nbytes() // self.granularity) * self.granularity)
        self._events.append(number)

        def gone(_: Any) -> None:
            del self._living[address]
            self._events.append(~number)

        self._living[address] = number, weakref.ref(storage, gone)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _without_values(tensor: Tensor) -> Tensor:
    if tensor.dtype in _REAL:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _everything(mask: Tensor) -> Tensor:
    with unset_fake_temporarily():
        return torch.ones(mask.shape, dtype=torch.bool, device=mask.device)


def _accumulates(func: Any, tensors: Sequence[Tensor]) -> bool:
    # Whether autograd adds up two gradients of one tensor: in place, unless a mode like this one is on.
    if func is not _aten.add.Tensor or torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
        return False
    if len(tensors) != 2 or tensors[0].shape != tensors[1].shape or tensors[0].dtype != tensors[1].dtype:
        return False
    # Held by its tensor and by the object asked here, and by nothing else.
    return torch._C._storage_Use_Count(tensors[0].untyped_storage()._cdata) <= 2


def _storages(tensor: Any) -> Iterator[Any]:
    if not isinstance(tensor, Tensor):
        return
    if is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, FakeTensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _storages(getattr(tensor, name))
    else:
        yield tensor.untyped_storage()
