"""Logs of figures by example, in open-unlearning's format: what must be in one that is a reference."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_ssiuu.evaluation.suites.base import entry_of
from lightning_ssiuu.utils.reading import only, reading


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
