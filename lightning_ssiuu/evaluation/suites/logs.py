"""Logs of figures by example, in open-unlearning's format: what must be in one that is a reference."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_ssiuu.evaluation.suites.base import Suite, entry_of
from lightning_ssiuu.utils.errors import Given, UserError
from lightning_ssiuu.utils.reading import only, read_json, reading

#: What ``evaluate`` writes beside a log.
FIGURES = "evaluate.json"


def check_log(content: Mapping[str, Any], names: Iterable[str], path: str | os.PathLike[str]) -> None:
    """Check the figures that are compared with, before anything is measured.

    Raises:
        UserError: If one is missing, or is not what such a log holds.
    """
    for name in names:
        entry = entry_of(content, name)
        with reading("reference", os.fspath(path), f"a log whose {name} has numbers by example", quote=False):
            parts = [entry[of] for of in ("forget", "holdout") if of in entry] or [entry]
            only((int, float), entry["agg_value"])
            for part in parts:
                only((int, float), *(each["score"] for each in part["value_by_index"].values()))
                _ = list(map(int, part["value_by_index"]))


def beside(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``evaluate.json`` says of the log at ``path``; empty where there is none beside it, or of another log."""
    file = Path(path).with_name(FIGURES)
    content: dict[str, Any] = read_json(file, "reference", check=_check_figures) if file.is_file() else {}
    return content if content.get("log") == Path(path).name else {}


def _check_figures(content: Mapping[str, Any]) -> None:
    made = content.get("provenance") or {}
    only(dict, made, made.get("weights_sha256") or {}, content.get("sets_sha256") or {})


def check_examples(
    content: Mapping[str, Any], suite: Suite, names: Iterable[str], sets: Mapping[str, Sequence[object]]
) -> None:
    """Check that the figures of a log are of as many examples as the sets have, which are those of a split.

    Raises:
        UserError: If one is not.
    """
    for name in names:
        parts = [content[name][of] for of in ("forget", "holdout") if of in content[name]] or [content[name]]
        asked = list(dict.fromkeys(reading.set for reading in suite.readings(suite.wanted([name]))))
        for part, of in zip(parts, asked, strict=False):
            if (found := len(part["value_by_index"])) != len(sets[of]):
                raise UserError("reference", Given(f"a log of {found} {of} examples"), f"one of {len(sets[of])}")
