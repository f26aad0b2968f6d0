"""What the original model says about the training examples, without a second model in memory.

An objective names what it compares with (``UnlearningModule.references``). Before the first step it is computed once by
the model that is about to change, and kept on disk; with adapters it is computed in every step by the same weights with
the adapters off; on request a frozen second model is kept.

What is kept are numbers of the forget set's answers, from which a patient reader could tell much of their text: it
stays in the user's own cache (``LIGHTNING_SSIUU_CACHE``, or ``~/.cache/lightning_ssiuu``), in a directory for that user
alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_ssiuu.models.answers import AnswerModel, Part
from lightning_ssiuu.models.loading import evaluation_mode, frozen_reference
from lightning_ssiuu.models.lora import adapted_layers
from lightning_ssiuu.training.fsdp import is_sharded
from lightning_ssiuu.training.shards import local
from lightning_ssiuu.utils.distributed import gathered
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.files import cache_directory, check_space

#: ``(model, part) -> (values, counts)``: ``values [N, ...]`` row by row, ``counts [B]`` rows of each sequence, None for
#: one row each.
Observation = Callable[[AnswerModel, Part], tuple[Tensor, Tensor | None]]

# Where each example's values are, by what is observed: rows of example id, number of the file, first row and the next.
_INDEX = "index.safetensors"
_SHARD = 1 << 26  # bytes of a file, but for its last batch


def reference_logps(model: AnswerModel, part: Part) -> tuple[Tensor, Tensor | None]:
    """Observes ``log P(y|x)`` of each answer, in nats: ``[B]``."""
    return model(part["input_ids"], part["attention_mask"], part["labels"]).logps, None


def reference_logits(model: AnswerModel, part: Part) -> tuple[Tensor, Tensor | None]:
    """Observes the logits at the labelled positions: ``[N, V]``."""
    answers = model(part["input_ids"], part["attention_mask"], part["labels"])
    return answers.logits, answers.lengths


class StoredReference:
    """Values kept on disk by :func:`store`, read batch by batch (memory-mapped).

    Raises:
        UserError: If the directory is not there or not complete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._index = load_file(folder / _INDEX)
        except (OSError, SafetensorError) as error:
            allowed = f"a run whose reference is still there ({folder} is not), or model.reference second_model"
            raise UserError("ckpt_path", "a checkpoint of a run with a cached reference", allowed) from error

    def __call__(self, name: str, part: Part) -> Tensor:
        """The values of a part's examples (by ``example_id``), in their order: ``[N, ...]`` on the part's device.

        Raises:
            UserError: If an example was not among those the reference was computed on.
        """
        values, index = [], self._index[name]
        examples = part["example_id"].cpu()
        places = torch.searchsorted(index[:, 0].contiguous(), examples).clamp(max=len(index) - 1)
        for example, (known, number, start, stop) in zip(examples.tolist(), index[places].tolist(), strict=True):
            if known != example:
                raise UserError("data", f"example id {example}", "training examples known when training began")
            with safe_open(_file(self.folder, name, number), framework="pt") as content:
                values.append(content.get_slice("values")[start:stop])
        return torch.cat(values).to(part["example_id"].device)


def _file(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name.replace('/', '-')}-{number}.safetensors"


class LiveReference:
    """Values computed when asked for: by a frozen second model, or by the same one with its adapters off."""

    def __init__(self, model: AnswerModel, observations: Mapping[str, Observation]) -> None:
        self.model, self.observations = model, observations

    def __call__(self, name: str, part: Part) -> Tensor:
        """The values of a part: ``[N, ...]``, without gradients."""
        with torch.no_grad(), evaluation_mode(self.model), without_adapters(self.model):
            return self.observations[name](self.model, part)[0]


Reference = StoredReference | LiveReference


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, a model with adapters is the one they were attached to."""
    layers = [layer for _, layer in adapted_layers(model)]
    before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def reference_key(model: nn.Module, observations: Iterable[str], examples: Mapping[str, Iterable[Part]]) -> str:
    """A digest of weights, training examples (by part) and names of what is observed; the same on every rank."""
    own = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        part = local(tensor)
        own.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
        own.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if part.numel() else b"")
    digest = hashlib.sha256("".join(gathered(own.hexdigest())).encode())
    digest.update(json.dumps([torch.__version__, _INDEX, sorted(observations)]).encode())
    for name, batches in examples.items():
        digest.update(name.encode())
        for batch in batches:
            for field in ("example_id", "input_ids", "labels"):
                digest.update(str(batch[field].tolist()).encode())
    return digest.hexdigest()[:32]


def reference_folder(key: str) -> Path:
    """Where the values under a key are kept."""
    return cache_directory() / "references" / key


class _Shards:
    # The values of one observation, written to files as they come, and where they are.
    def __init__(self, folder: Path | None, name: str) -> None:
        self.folder, self.name = folder, name
        self.places, self.waiting = array("q"), list[Tensor]()
        self.number = self.rows = self.bytes = 0

    def add(self, examples: Tensor, values: Tensor, counts: Tensor | None) -> None:
        lengths = [1] * len(examples) if counts is None else counts.long().tolist()
        for example, length in zip(examples.tolist(), lengths, strict=True):
            self.places.extend((example, self.number, self.rows, self.rows + length))
            self.rows += length
        self.waiting.append(values.cpu())
        self.bytes += values.numel() * values.element_size()
        if self.bytes >= _SHARD:
            self.write()

    def write(self) -> None:
        if self.waiting:
            assert self.folder is not None
            check_space("LIGHTNING_SSIUU_CACHE", str(self.folder.parent), self.bytes)
            save_file({"values": torch.cat(self.waiting)}, _file(self.folder, self.name, self.number))
            self.number, self.rows, self.bytes, self.waiting = self.number + 1, 0, 0, []

    def close(self) -> Tensor:
        self.write()
        places = torch.tensor(self.places, dtype=torch.long).view(-1, 4)
        return places[places[:, 0].argsort()]


def store(
    folder: Path,
    model: AnswerModel,
    observations: Mapping[str, Observation],
    examples: Mapping[str, Callable[[], Iterable[Part]]],
    writes: bool = True,
) -> None:
    """Compute all values and keep them in a folder, which appears when it is complete; the model is left as it was.

    Each rank must call it and computes them all, on the same ``examples`` (by part), and one of a machine ``writes``.

    Raises:
        UserError: If the disk refuses.
    """
    partial: Path | None = None
    index: dict[str, Tensor] = {}
    try:
        if writes:
            check_space("LIGHTNING_SSIUU_CACHE", str(folder.parent), 1 << 20)
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))  # for this user alone
        for name, observe in observations.items():
            shards = _Shards(partial, name)
            for part in examples[name.partition("/")[0]]():
                with torch.no_grad(), evaluation_mode(model):
                    values, counts = observe(model, part)
                if partial is not None:
                    shards.add(part["example_id"], values, counts)
            index[name] = shards.close()
        if partial is not None:
            save_file(index, partial / _INDEX)
            try:
                partial.rename(folder)
            except OSError:
                if not folder.is_dir():  # two runs at once: the first one's stays
                    raise
    except (OSError, SafetensorError) as error:  # the latter for a disk that filled up
        raise UserError("LIGHTNING_SSIUU_CACHE", str(folder.parent), f"a directory to write to ({error})") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def find_reference(module: Any, observations: Mapping[str, Observation], resumed: bool) -> Reference:
    """What gives an objective the original model's values, when training starts; each rank must call it.

    ``resumed`` says whether the weights are an interrupted run's, no longer the original ones.

    Raises:
        UserError: If the disk refuses, or an interrupted run's values are gone.
    """
    if module.lora is not None:
        return LiveReference(module.model, observations)
    if module.reference == "second_model":
        # What is resumed is not the original any more; what is sharded cannot be copied whole.
        copied = not resumed and not is_sharded(module)
        second: Any = frozen_reference(module.model if copied else module.build(module.device))
        return LiveReference(second.to(module.device), observations)
    parts = sorted({name.partition("/")[0] for name in observations})
    examples = {part: partial(module.training_parts, part) for part in parts}
    if module.reference_key is None:
        module.reference_key = reference_key(
            module.model, observations, {part: each() for part, each in examples.items()}
        )
    folder = reference_folder(module.reference_key)
    if not resumed and not all(gathered(folder.is_dir())):
        with module.trainer.precision_plugin.forward_context():
            store(folder, module.model, observations, examples, writes=module.trainer.local_rank == 0)
        module.trainer.strategy.barrier()
    return StoredReference(folder)
