"""open-unlearning's own evaluation of TOFU, from a checkout, without what it imports."""

from __future__ import annotations

import importlib
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
from peer_code import rank_auc
from torch import nn


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
