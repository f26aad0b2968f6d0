"""``certificate.html``: a certificate on a page that prints, and needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_ssiuu.utils.figures import COLOURS, clean

_TONES = {"erased": "erased", "hidden": "hidden"}


def certificate_html(content: Mapping[str, Any]) -> str:
    """The page of a ``certificate.json``. Whatever stands in names and ids is text on it, never markup."""
    rows = {
        (split, score): None
        for by_split in content["scores"].values()
        for split in by_split
        for score in by_split[split]
    }
    tone = COLOURS[_TONES.get(content["verdict"]["label"], "undecided")]
    return _environment().get_template("certificate.html").render({**content, "score_rows": list(rows), "tone": tone})


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lightning_ssiuu.reports.certificate"),
        autoescape=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"one_decimal": lambda value: "" if value is None else f"{value:.1f}", "how": _how}
    return environment


def _how(row: Mapping[str, Any]) -> str:
    rates = row.get("learning_rates")
    words = [f"learning rates {', '.join(f'{rate:g}' for rate in rates)}"] if rates else []
    words += [f"{row['epochs']} epochs"] if "epochs" in row else []
    words += [str(row["variant"])] if row.get("variant") else []
    words += row.get("attackers", [])
    return ", ".join(words)
