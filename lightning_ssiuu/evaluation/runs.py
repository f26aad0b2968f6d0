"""Find what a finished run knows about itself: its data section, its score, where results belong."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_ssiuu.datamodules import Facts, UnlearningDataModule
from lightning_ssiuu.models.architectures import Architecture, find_architecture
from lightning_ssiuu.models.loading import check_loadable, load_tokenizer, resolve_checkpoint
from lightning_ssiuu.utils.errors import UserError, naming
from lightning_ssiuu.utils.registry import no_module


def run_of(model: str) -> Path | None:
    """The run directory a saved model lies in, or None for a model that ``fit`` did not write."""
    parent = Path(model).absolute().parent
    return parent if (parent / "config.yaml").is_file() and (parent / "metrics.json").is_file() else None


def output_directory(model: str, output: str | None) -> Path:
    """Where results on a saved model go: ``output``, else beside it in its run."""
    if output is not None:
        return Path(output)
    if (run := run_of(model)) is None:
        raise UserError("output", None, "a directory: the model is not part of a run that results could be put beside")
    return run


def resolve_models(models: Mapping[str, str]) -> list[str]:
    """Resolve checkpoints, given by the name of their argument, before any of them is loaded."""
    sources = []
    for argument, checkpoint in models.items():
        with naming(argument):
            sources.append(resolve_checkpoint(checkpoint))
            check_loadable(checkpoint)
    return sources


def check_tokenizers(models: Mapping[str, str], data: UnlearningDataModule) -> None:
    """Check that models, given by the name of their argument, split text as the data module does.

    They are compared token by token.
    """
    vocabulary = data.tokenizer.get_vocab()
    for argument, checkpoint in models.items():
        with naming(argument):
            tokenizer = load_tokenizer(checkpoint)
        if tokenizer.get_vocab() != vocabulary:
            raise UserError(argument, checkpoint, "a model with the same tokenizer as the others")


def run_score(model: str, default: str = "probability") -> str:
    """The score a run was stopped by, as written in its ``metrics.json``."""
    run = run_of(model)
    return json.loads((run / "metrics.json").read_text(encoding="utf-8"))["score"] if run else default


def run_data(model: str, data: UnlearningDataModule | None) -> UnlearningDataModule:
    """The data module to judge a model by: the one given, else its run's, else the embedded facts.

    Whatever tokenizer the run's data module names, what comes back has the saved model's.
    """
    if data is None:
        run = run_of(model)
        data = Facts(tokenizer=model) if run is None else _from_config(run / "config.yaml")
    if isinstance(data.tokenizer_or_name, str):
        data.tokenizer_or_name = model
    return data


def run_architecture(
    model: str, architecture: str | Mapping[str, Any] | Architecture | None = None
) -> Architecture | None:
    """The record a model is described by: the one given, else its run's; None: by its type."""
    run = run_of(model)
    if architecture is not None or run is None:
        return find_architecture(architecture)
    section: Any = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")).get("model") or {}
    return find_architecture((section.get("init_args") or {}).get("architecture"))


def _from_config(path: Path) -> UnlearningDataModule:
    from jsonargparse import ArgumentError, ArgumentParser

    section: Any = yaml.safe_load(path.read_text(encoding="utf-8")).get("data")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(UnlearningDataModule, "data")
    try:
        return parser.instantiate_classes(parser.parse_object({"data": section})).data
    except (ArgumentError, AttributeError, TypeError) as error:
        missing = re.search(r"No module named '([^']+)'", str(error))
        why = f" ({no_module(missing[1])})" if missing else ""
        allowed = f"data given explicitly: the run's configuration names a data module that cannot be built here{why}"
        raise UserError("data", str(path), allowed) from error
