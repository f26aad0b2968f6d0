"""open-unlearning's own losses, metrics, collator and optimiser, from a checkout, without what they import."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

STOOD_IN = ("trainer", "deepspeed", "data", "evals")
#: Files of classes that are not called like them.
FILES = {"GradAscent": "grad_ascent", "GradDiff": "grad_diff"}
COLLATOR = "DataCollatorForSupervisedDataset"
_ARGUMENTS = TrainingArguments(output_dir="unused", use_cpu=True, report_to=[])


class _UnlearnTrainer:
    """Stands for the peer's, a Trainer, of which its losses need this: later ones write ``compute_unlearn_loss``."""

    def compute_loss(self, model: nn.Module, inputs: Any) -> Tensor:
        loss: Tensor = self.compute_unlearn_loss(model, inputs)  # type: ignore[attr-defined]
        return loss


def rank_auc(labels: Any, scores: Any) -> float:
    """Area under the ROC curve, for scikit-learn's where that is not installed."""
    from torchmetrics.functional.classification import binary_auroc

    # Other scores than probabilities would go through a sigmoid first: their ranks are all that counts.
    ranks = torch.unique(torch.as_tensor(scores), return_inverse=True)[1].double()
    return float(binary_auroc(ranks / max(len(ranks), 1), torch.as_tensor(labels)))


@contextmanager
def imported(peer: Path) -> Iterator[Callable[[str], Any]]:
    """The peer's classes by name, from the files of its losses and its collator; what they import is stood in for.

    What else its ``src`` holds goes by its import path, as ``evals.metrics.utils.evaluate_probability``.
    """
    source = peer / "src"
    before = dict(sys.modules)

    def stand_in(name: str, **members: Any) -> None:
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(members)

    def load(name: str) -> None:
        file = source.joinpath(*name.split(".")).with_suffix(".py")
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None or not file.is_file():
            raise SystemExit(f"error: --peer: got {str(peer)!r}, allowed: a checkout of open-unlearning (no {file})")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])

    def class_named(name: str) -> Any:
        if "." in name:
            return getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2])
        module = "data.collators" if name == COLLATOR else f"trainer.unlearn.{FILES.get(name, name.lower())}"
        if module not in sys.modules:
            load(module)
        return getattr(sys.modules[module], name)

    try:
        stand_in("data", __path__=[], get_datasets=None, get_collators=None)
        stand_in("data.utils", IGNORE_INDEX=-100)
        stand_in("trainer", __path__=[])
        stand_in("trainer.unlearn", __path__=[])
        stand_in("trainer.unlearn.base", UnlearnTrainer=_UnlearnTrainer)
        if importlib.util.find_spec("deepspeed") is None:
            stand_in("deepspeed")  # for RMU's, which asks it nothing here
        for package in ("evals", "evals.metrics", "evals.metrics.mia"):
            stand_in(package, __path__=[str(source.joinpath(*package.split(".")))])
        if importlib.util.find_spec("sklearn") is None:
            stand_in("sklearn", __path__=[])
            stand_in("sklearn.metrics", roc_auc_score=rank_auc)
        load("trainer.utils")
        class_named("GradDiff")
        yield class_named
    finally:
        for name in [name for name in sys.modules if name not in before and _is_stood_in(name)]:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if _is_stood_in(name)})


def _is_stood_in(name: str) -> bool:
    package = name.split(".")[0]
    return package in STOOD_IN or (package == "sklearn" and not getattr(sys.modules.get(package), "__file__", ""))


def collated(
    class_named: Callable[[str], Any], tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """One of our batches of as many forget as retain sequences, as the peer's collator pads the same sequences."""
    parts = {}
    for name, part in batch.items():
        rows = zip(part["input_ids"], part["labels"], part["attention_mask"].bool(), strict=True)
        parts[name] = [{"input_ids": ids[own], "labels": labels[own]} for ids, labels, own in rows]
    examples = [dict(zip(parts, rows, strict=True)) for rows in zip(*parts.values(), strict=True)]
    batched: dict[str, dict[str, Tensor]] = class_named(COLLATOR)(tokenizer)(examples)
    return batched


def trainer_default(parameters: Any, learning_rate: float) -> Optimizer:
    """The optimiser that a Trainer of the installed transformers makes unless told otherwise (fused AdamW).

    The peer's configurations name a paged one of bitsandbytes, which needs a GPU.
    """
    kind, options = Trainer.get_optimizer_cls_and_kwargs(_ARGUMENTS)
    made: Optimizer = kind(parameters, **options | {"lr": learning_rate})
    return made


class PeerStep:
    """A step of one of the peer's methods as its Trainer takes it: loss, backward pass, clipping, optimiser.

    Args:
        class_named: What :func:`imported` gives.
        name: Of the method's class.
        model: The transformers model, trained in place.
        optimizer: Of its weights, e.g. :func:`trainer_default`.
        options: Attributes of its object beside both weights (1) and the retain loss (NLL).
    """

    def __init__(
        self, class_named: Callable[[str], Any], name: str, model: nn.Module, optimizer: Optimizer, **options: Any
    ) -> None:
        kind = class_named(name)
        self.method, self.model = kind.__new__(kind), model  # its Trainer's own preparations are not needed
        own: dict[str, Any] = {"gamma": 1.0, "alpha": 1.0, "retain_loss_type": "NLL", "model": model}
        if name in ("NPO", "UNDIAL", "DPO"):
            own |= {"beta": 0.1, "ref_model": copy.deepcopy(model).eval()}
        vars(self.method).update(own | options)
        self.optimizer = optimizer

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Of a batch of its collator's."""
        loss: Tensor = self.method.compute_loss(self.model, batch)
        return loss

    def __call__(self, *batches: Mapping[str, Any]) -> None:
        """Take the step, of one batch or of several that are accumulated."""
        for batch in batches:
            (self.loss(batch) / len(batches)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _ARGUMENTS.max_grad_norm)
        self.optimizer.step()
        self.model.zero_grad()
