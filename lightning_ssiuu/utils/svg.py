"""A figure as the inside of a page: SVG without ids, links and style sheets, in the page's own colours."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping

from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from lightning_ssiuu.utils.figures import COLOURS, HOVER, clean, laid_out, style

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_VARIABLES = {light: f"var(--{name})" for name, light in COLOURS.items()}
_PLACES = {"text": ("x", "y", "transform"), "path": ("d",)}
# The page's font, and what is matplotlib's and browsers' default.
_LEFT_OUT = {"font-size", "font-family", "stroke-dashoffset", "stroke-linejoin"}


def svg(figure: Figure, description: str) -> Markup:
    """An ``<svg>`` for the inside of a page; its colours are the page's ``var(--name)`` by the names of the palette.

    It has no id, style sheet, link or background of its own, its texts are text, and it takes the page's font.
    ``description`` is what a screen reader says.
    """
    buffer = io.BytesIO()
    with style():
        drawn = laid_out(figure, FigureCanvasSVG, 72)
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    written = ET.fromstring(buffer.getvalue())
    shapes = {f"#{element.get('id')}": element for element in written.iter(f"{_SVG}path") if element.get("id")}
    attributes = {"viewBox": written.get("viewBox", ""), "role": "img", "aria-label": clean(description)}
    picture = ET.Element("svg", attributes)
    picture.extend(_inlined(written, shapes))
    return Markup(ET.tostring(picture, encoding="unicode"))


def _inlined(parent: ET.Element, shapes: Mapping[str, ET.Element]) -> list[ET.Element]:
    # What a page needs of matplotlib's elements: paths and texts, those used from elsewhere put in their place.
    kept: list[ET.Element] = []
    for element in parent:
        tag = element.tag.removeprefix(_SVG)
        if tag == "g":
            inner = _inlined(element, shapes)
            hover = element.get("id", "")
            if hover.startswith(HOVER) and inner:
                ET.SubElement(inner[0], "title").text = hover.removeprefix(HOVER)
            kept += inner
        elif tag in _PLACES:
            kept.append(ET.Element(tag, _attributes(element, *_PLACES[tag])))
            kept[-1].text = element.text
        elif tag == "use":
            kept.append(ET.Element("path", _attributes(shapes[element.get(_LINK, "")], "d")))
            x, y = (element.get(name, "0") for name in "xy")
            kept[-1].attrib |= _attributes(element) | {"transform": _rounded(f"translate({x} {y})")}
    return [element for element in kept if re.search("(stroke|fill):(?!none)", element.get("style", ""))]


def _attributes(element: ET.Element, *names: str) -> dict[str, str]:
    values = {name: _rounded(element.get(name, "")) for name in names}
    if values.get("transform", "").startswith("rotate(-0 "):
        del values["transform"]
    declared = (part.split(": ") for part in element.get("style", "").split("; ") if part)
    shown = [f"{name}:{_VARIABLES.get(value, value)}" for name, value in declared if name not in _LEFT_OUT]
    return values | {"style": ";".join(shown)}


def _rounded(numbers: str) -> str:
    text = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.1f}".removesuffix(".0"), numbers)
    text = re.sub(r" ?([A-Za-z]) ?", r"\1", " ".join(text.split()))
    return re.sub(r"M(\S+ \S+)L\1(?=M|$)", r"M\1h0", text)  # the shortest of strokes
