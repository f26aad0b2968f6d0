"""The loggers of a finished run, for what is found of its model later: the audit's verdict."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from lightning.pytorch.loggers import Logger

from lightning_ssiuu.attribution.influence import InfluenceVariation
from lightning_ssiuu.evaluation.results import check_metrics, read_config, read_result
from lightning_ssiuu.evaluation.runs import run_of
from lightning_ssiuu.utils.loggers import closed, log_image, log_text, reopened
from lightning_ssiuu.utils.registry import lookup, shortened


def log_verdict(model: str, content: Mapping[str, Any], variation: InfluenceVariation) -> None:
    """Give the verdict of an ``audit.json`` to the loggers of the model's run, if it has any that can go on.

    They get ``audit/verdict`` (the label) and ``audit/sentence``, the scores and totals of D⁺ and D⁻ as ``audit/...``,
    and the heat maps. No text of the data is among them. What a logger cannot take (no network) is a warning: the
    audit's files are written by then.
    """
    run = run_of(model)
    if run is None:
        return
    metrics = read_result(run / "metrics.json", "unlearned", check_metrics)
    given = (read_config(run, "unlearned").get("trainer") or {}).get("logger")
    identities = metrics.get("loggers") or []
    for entry, identity in zip(given if isinstance(given, list) else [given], identities, strict=False):
        try:
            for logger in _opened(entry, identity):
                _log(logger, content, variation, metrics.get("steps") or 0)
        except Exception as error:  # of its library, its server, its disk
            name = entry["class_path"].rpartition(".")[2]
            warnings.warn(f"the verdict was not logged to {name}: {shortened(str(error))}", stacklevel=2)


def _opened(entry: Any, identity: Any) -> Iterator[Logger]:
    if not isinstance(entry, Mapping):  # none, or Lightning's own choice
        return
    options = entry.get("init_args") or {}
    logger = reopened(lookup(entry["class_path"]), {**options, **(entry.get("dict_kwargs") or {})}, identity)
    if logger is not None:
        yield logger
        closed(logger)


def _log(logger: Logger, content: Mapping[str, Any], variation: InfluenceVariation, step: int) -> None:
    from lightning_ssiuu.attribution.plots import heat_maps_figure  # with it comes matplotlib

    scores, influence = content["scores"]["unlearned"], content["influence"]["unlearned"]
    figures = {f"audit/{split}_{score}": value for split, own in scores.items() for score, value in own.items()}
    logger.log_metrics(figures | {f"audit/{name}": value for name, value in influence.items()}, step)
    log_text([logger], "audit/verdict", content["verdict"]["label"], step)
    log_text([logger], "audit/sentence", content["verdict"]["sentence"], step)
    log_image([logger], "audit/heat_maps", partial(heat_maps_figure, variation), step)
