"""open-unlearning's own losses, collator, optimiser and evaluation, from a checkout, without what they import."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

STOOD_IN = ("trainer", "deepspeed", "data")
#: Files of classes that are not called like them.
FILES = {"GradAscent": "grad_ascent", "GradDiff": "grad_diff"}
COLLATOR = "DataCollatorForSupervisedDataset"
_ARGUMENTS = TrainingArguments(output_dir="unused", use_cpu=True, report_to=[])


@dataclass(frozen=True)
class PeersMetrics:
    """The peer's evaluation of TOFU.

    Args:
        names: Of its figures.
        preprocess: Its function from question and answer to token ids and labels.
        configurations: Its figures' configurations by name, composed.
        make: What makes its evaluator of a configuration.
    """

    names: Sequence[str]
    preprocess: Callable[..., Any]
    configurations: Mapping[str, Any]
    make: Callable[..., Any]

    def evaluate(
        self,
        model: nn.Module,
        tokenizer: Any,
        template: Mapping[str, Any],
        names: Sequence[str],
        output: str,
        log: str | None,
        reference: str,
    ) -> dict[str, Any]:
        """Its log of these figures, for forget01; ``log`` is that of the reference, whose weights are ``reference``."""
        from omegaconf import OmegaConf

        metrics = {name: self.configurations[name] for name in names}
        if "mia_reference" in metrics:
            metrics["mia_reference"] = metrics["mia_reference"] | {"reference_model_path": reference}
        tofu = {"metrics": metrics, "output_dir": output, "overwrite": True, "batch_size": 8}
        tofu |= {"forget_split": "forget01", "holdout_split": "holdout01"}
        tofu |= {"retain_logs_path": log, "question_key": "question"}
        evaluator = self.make("TOFU", OmegaConf.create({"eval": {"tofu": tofu}}).eval.tofu)
        with redirect_stdout(StringIO()):  # it counts its examples
            evaluator.evaluate(model, tokenizer=tokenizer, template_args=template)
        found: dict[str, Any] = json.loads(Path(output, "TOFU_EVAL.json").read_text(encoding="utf-8"))
        return found


@contextmanager
def metrics_of(
    peer: Path, files: Mapping[str, Sequence[Mapping[str, Any]]], new_tokens: int = 200
) -> Iterator[PeersMetrics]:
    """The peer's evaluation of TOFU, reading ``files`` by name in place of the hub's configurations."""
    import datasets

    source, folder = peer / "src", peer / "configs" / "eval" / "tofu_metrics"
    if not folder.is_dir():
        raise SystemExit(f"error: --peer: got {str(peer)!r}, allowed: a checkout of open-unlearning (no {folder})")
    before = set(sys.modules)
    package = ModuleType("evals")  # its own asks for lm_eval
    vars(package)["__path__"] = [str(source / "evals")]
    sys.path.insert(0, str(source))
    sys.modules["evals"] = package
    if importlib.util.find_spec("sklearn") is None:
        for name, members in (("sklearn", {}), ("sklearn.metrics", {"roc_auc_score": rank_auc})):
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(members)
    try:
        base, utils = importlib.import_module("evals.base"), importlib.import_module("data.utils")
        vars(importlib.import_module("data.qa"))["load_hf_dataset"] = lambda path, name, split: (
            datasets.Dataset.from_list([dict(record) for record in files[name]])
        )
        configurations = {file.stem: composed(file) for file in folder.glob("*.yaml")}
        for configuration in configurations.values():
            for part in (configuration, *configuration.get("pre_compute", {}).values()):
                if "generation_args" in part:
                    part["generation_args"]["max_new_tokens"] = new_tokens
        yield PeersMetrics(tuple(configurations), utils.preprocess_chat_instance, configurations, base.Evaluator)
    finally:
        sys.path.remove(str(source))
        for name in [
            name for name in sys.modules if name not in before and name.split(".")[0] in ("evals", "data", "sklearn")
        ]:
            del sys.modules[name]


def rank_auc(labels: Any, scores: Any) -> float:
    """Area under the ROC curve by the rank-sum statistic of scipy, where scikit-learn is missing."""
    from scipy.stats import mannwhitneyu

    positive, negative = scores[labels == 1], scores[labels == 0]
    return float(mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))


def composed(file: Path) -> dict[str, Any]:
    """A configuration with those that its ``defaults`` name (``folder@place: name``) at their places."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    whole: dict[str, Any] = {}
    for default in content.pop("defaults", []):
        ((where, name),) = ({"": default} if isinstance(default, str) else default).items()
        path, _, place = where.partition("@")
        inner = composed((file.parent / path / name).with_suffix(".yaml"))
        for part in filter(None, reversed(place.split("."))):
            inner = {part: inner}
        whole = merged(whole, inner)
    return merged(whole, content)


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings in one; where both have a value, the second's."""
    inner = {
        name: merged(first[name], value)
        if isinstance(value, Mapping) and isinstance(first.get(name), Mapping)
        else value
        for name, value in second.items()
    }
    return {**first, **inner}


@contextmanager
def imported(peer: Path) -> Iterator[Callable[[str], Any]]:
    """The peer's classes by name, from the files of its losses and its collator; what they import is stood in for."""
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
        module = "data.collators" if name == COLLATOR else f"trainer.unlearn.{FILES.get(name, name.lower())}"
        if module not in sys.modules:
            load(module)
        return getattr(sys.modules[module], name)

    try:
        stand_in("data", __path__=[])
        stand_in("data.utils", IGNORE_INDEX=-100)
        stand_in("trainer", __path__=[])
        stand_in("trainer.unlearn", __path__=[])
        stand_in("trainer.unlearn.base", UnlearnTrainer=object)
        if importlib.util.find_spec("deepspeed") is None:
            stand_in("deepspeed")  # for RMU's, which asks it nothing here
        load("trainer.utils")
        class_named("GradDiff")
        yield class_named
    finally:
        for name in [name for name in sys.modules if name not in before and name.split(".")[0] in STOOD_IN]:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name.split(".")[0] in STOOD_IN})


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


def trainer_default(model: nn.Module, learning_rate: float) -> Optimizer:
    """The optimiser that a Trainer of the installed transformers makes unless told otherwise (fused AdamW).

    The peer's configurations name a paged one of bitsandbytes, which needs a GPU.
    """
    kind, options = Trainer.get_optimizer_cls_and_kwargs(_ARGUMENTS)
    made: Optimizer = kind(model.parameters(), **options | {"lr": learning_rate})
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
        if name == "NPO":
            own |= {"beta": 0.1, "ref_model": copy.deepcopy(model).eval()}
        vars(self.method).update(own | options)
        self.optimizer = optimizer

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Of a batch of its collator's."""
        loss: Tensor = self.method.compute_loss(self.model, batch)
        return loss

    def __call__(self, batch: Mapping[str, Any]) -> None:
        """Take the step."""
        self.loss(batch).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _ARGUMENTS.max_grad_norm)
        self.optimizer.step()
        self.model.zero_grad()
