"""Pages that need nothing else: what the templates of ``reports/templates`` have in common."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_ssiuu.utils import figures
from lightning_ssiuu.utils.figures import clean
from lightning_ssiuu.utils.terminal import three_digits


def page(template: str, **content: Any) -> str:
    """A page from a template beside this file. Whatever stands in ``content`` is text on it, never markup."""
    return _environment().get_template(template).render(**content, palette=figures.PALETTE)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lightning_ssiuu.reports"),
        autoescape=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["attack_title"] = attack_title
    environment.filters["words"] = lambda text: clean(str(text)).replace("_", " ")
    environment.filters["unbroken"] = lambda text: re.sub(r"(?<=\d) %", "\u00a0%", clean(text))
    environment.filters["one_decimal"] = lambda value: "–" if _missing(value) else f"{value:.1f}"
    environment.filters["three_digits"] = _three_digits
    return environment


def _three_digits(value: Any) -> str:
    return "–" if _missing(value) else three_digits(value).replace("inf", "∞")


def attack_title(attack: str, p: float | None) -> str:
    """An attack in words.

    >>> attack_title("harmful_lora", 0.3)
    'harmful lora attack with 30 % of the forget set'
    """
    name = attack.replace("_", " ")
    return f"{name} attack" if p is None else f"{name} attack with {100 * p:g} % of the forget set"


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
