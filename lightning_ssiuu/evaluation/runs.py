"""Find what a finished run knows about itself: its data section, its score, where results belong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_ssiuu.datamodules import Facts, UnlearningDataModule
from lightning_ssiuu.evaluation.results import check_metrics, read_config, read_result
from lightning_ssiuu.evaluation.retention import Retention
from lightning_ssiuu.models.architectures import Architecture, find_architecture
from lightning_ssiuu.models.checks import tokenizers_differ
from lightning_ssiuu.models.loading import check_loadable, load_tokenizer, resolve_checkpoint
from lightning_ssiuu.utils.errors import UserError, causes, naming
from lightning_ssiuu.utils.reading import reading
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
    for argument, checkpoint in models.items():
        with naming(argument):
            tokenizer = load_tokenizer(checkpoint)
        if (difference := tokenizers_differ(tokenizer, data.tokenizer)) is not None:
            raise UserError(argument, checkpoint, f"a model with the same tokenizer as the others, not {difference}")


def run_score(model: str, default: str = "probability", argument: str = "model") -> str:
    """The score a run was stopped by, as written in its ``metrics.json``; errors name the ``argument`` of the model."""
    run = run_of(model)
    return read_result(run / "metrics.json", argument, check_metrics)["score"] if run else default


def run_collapsed(model: str) -> bool | None:
    """Whether a run's model collapsed, as written in its ``metrics.json``; None where nobody knows."""
    run = run_of(model)
    return read_result(run / "metrics.json", "model", check_metrics).get("collapsed") if run else None


def oracle_retention(model: str, oracle: str) -> Retention | None:
    """What an oracle's retain score is beside the original's, as their runs' ``metrics.json`` have it.

    None unless both are models of runs on the same data, with the same score.
    """
    runs = [run_of(checkpoint) for checkpoint in (model, oracle)]
    contents = [read_result(run / "metrics.json", "oracle", check_metrics) for run in runs if run is not None]
    if len({(content.get("provenance") or {}).get("data_sha256") for content in contents}) != 1 or len(contents) != 2:
        return None
    score = contents[0]["score"]
    both = contents[0]["before"]["scores"].get("retain", {}), contents[1]["after"]["scores"].get("retain", {})
    before, after = (retain.get(score) for retain in both)
    if before is None or after is None:
        return None
    return Retention(score, before, after, contents[0].get("retain_chance") or 0.0, None)


def run_data(model: str, data: UnlearningDataModule | None, argument: str = "model") -> UnlearningDataModule:
    """The data module to judge a model by: the one given, else its run's, else the embedded facts.

    Whatever tokenizer the run's data module names, what comes back has the saved model's.
    """
    if data is None:
        run = run_of(model)
        data = Facts(tokenizer=model) if run is None else _from_config(run, argument)
    if isinstance(data.tokenizer_or_name, str):
        data.tokenizer_or_name = model
    return data


#: Options of a data module that say how its sets are asked, and how many of their examples.
ASKING = (
    *("template", "system_prompt", "template_options", "date", "max_length"),
    *("choice_template", "multiple_choice", "max_eval_examples"),
)


def asked_otherwise(model: str, data: UnlearningDataModule) -> dict[str, Any]:
    """The options of :data:`ASKING` in which a data module is not as the run's is, or as that of a model without one.

    All of them where the run's cannot be built here. They are what :func:`asking` needs to judge the model alike.
    """
    try:
        own = run_data(model, None)
    except UserError:
        return {name: getattr(data, name) for name in ASKING}
    return {name: getattr(data, name) for name in ASKING if getattr(data, name) != getattr(own, name)}


def asking(data: UnlearningDataModule, options: Mapping[str, Any]) -> UnlearningDataModule:
    """The same data, not read yet, asked by these options of :data:`ASKING`.

    Example:
        >>> asking(Facts(), {"max_eval_examples": 3}).n_scored("forget")
        3
    """
    for name in options.keys() & set(ASKING):
        setattr(data, name, options[name])
    return data


def run_architecture(
    model: str, architecture: str | Mapping[str, Any] | Architecture | None = None, argument: str = "model"
) -> Architecture | None:
    """The record a model is described by: the one given, else its run's; None: by its type."""
    run = run_of(model)
    if architecture is not None or run is None:
        return find_architecture(architecture)
    section = read_config(run, argument).get("model")
    options = section.get("init_args") if isinstance(section, dict) else None
    with reading(argument, str(run / "config.yaml"), "a configuration with an architecture that can be used here"):
        return find_architecture(options.get("architecture") if isinstance(options, dict) else None)


def made_of(name: str, kind: type[Any], section: Any) -> Any:
    """An object of a class or one derived from it, of a configuration's section; raises what jsonargparse does."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, name)
    config = parser.parse_object({name: section})
    try:
        return parser.instantiate_classes(config)[name]
    except Exception as error:
        for mistake in causes(error):  # what the class refuses comes as one of several reasons
            if isinstance(mistake, UserError):
                raise mistake from None
        raise


def data_of(section: Any) -> UnlearningDataModule:
    """The data module of a configuration's ``data`` section; raises what jsonargparse does."""
    data: UnlearningDataModule = made_of("data", UnlearningDataModule, section)
    return data


def _from_config(run: Path, argument: str) -> UnlearningDataModule:
    section = read_config(run, argument).get("data")
    try:
        return data_of(section)
    except UserError:
        raise
    except Exception as error:
        missing = re.search(r"No module named '([^']+)'", str(error))
        why = f" ({no_module(missing[1])})" if missing else ""
        allowed = f"data given explicitly: the run's configuration names a data module that cannot be built here{why}"
        raise UserError("data", str(run / "config.yaml"), allowed) from error
