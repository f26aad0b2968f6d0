"""``certificate.html``: a certificate on a page that prints, and needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_ssiuu.reports.pages import page


def certificate_html(content: Mapping[str, Any]) -> str:
    """The page of a ``certificate.json``. Whatever stands in names and ids is text on it, never markup."""
    scores = content["scores"].values()
    rows = list(dict.fromkeys((split, score) for by_split in scores for split in by_split for score in by_split[split]))
    return page("certificate.html", **content, score_rows=rows, how=_how)


def _how(row: Mapping[str, Any]) -> str:
    rates = row.get("learning_rates")
    words = [f"learning rates {', '.join(f'{rate:g}' for rate in rates)}"] if rates else []
    words += [f"{row['epochs']} epochs"] if "epochs" in row else []
    words += [str(row["variant"])] if row.get("variant") else []
    words += row.get("attackers", [])
    return ", ".join(words)
