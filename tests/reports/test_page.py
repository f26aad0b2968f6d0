"""``report.html``: complete, self-contained, and inert whatever stands in names and data."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from toys.reports import HOSTILE, audit_content, report, variation

from lightning_ssiuu.reports.audit.charts import Interval, Series, heat_map, interval_plot, line_chart, scatter
from lightning_ssiuu.reports.audit.page import Measured, report_html

_VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(report())


def test_hostile_strings_are_text(page: Page) -> None:
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert "javascript:" not in (attributes.get("href") or "").casefold()
    shown = "".join(page.text)
    for text in HOSTILE[:6]:
        assert shown.count(text) >= 5  # four in the examples, one in the command
    assert "1337" not in shown
    assert not re.search(r"[\x00-\x08\x1b]", shown)


def test_nothing_is_loaded_from_elsewhere(page: Page) -> None:
    links = {attributes["href"] for _, attributes in page.tags if attributes.get("href")}
    assert links == {"data:,", "audit_spurious_neurons.csv", "audit.json"}
    assert not [tag for tag, attributes in page.tags if "src" in attributes]
    plain = report(hostile=False)
    assert not re.search(r"https?:|url\(|@import", plain)
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_pictures_and_tables_can_be_read_out(page: Page) -> None:
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) == 12  # evidence, 2 attacks, 2 × 2 heat maps, curves, scatter, 3 lenses
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in pictures)
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    named = [attributes["aria-labelledby"] for tag, attributes in page.tags if tag == "section"]
    assert named == ids
    regions = [attributes for _, attributes in page.tags if (attributes.get("class") or "").startswith("scroll")]
    assert len(regions) == sum(tag == "table" for tag, _ in page.tags)
    assert all(region["tabindex"] == "0" and region["aria-label"] for region in regions)


def test_everything_is_there(page: Page) -> None:
    shown = "".join(page.text)
    for text in ("Verdict", "Grounds", "Scores", "Relearning", "Where influence changed", "Cumulative variation"):
        assert text in shown
    for text in ("ρ = 0.910, 95 % interval 0.880 to 0.930", "Logit lens", "60 flagged", "the first 50 shown", "Undone"):
        assert text in shown
    assert "Forget-set examples" in shown
    assert "prefers-color-scheme: dark" in shown
    assert "@media print" in shown


def test_text_of_the_forget_set_is_left_out() -> None:
    assert "Forget-set examples" not in report(examples=False)


def test_the_same_audit_gives_the_same_page() -> None:
    assert report() == report()


def test_a_report_of_the_least() -> None:
    """Not unlearned, nothing flagged, nothing attacked, D all zero, bounds that are not known."""
    content = audit_content(hostile=False)
    content |= {"flagged": [], "relearning": None, "ablation": None, "logit_lens": None, "correlation": None}
    content["verdict"]["grounds"] = content["verdict"]["grounds"][:2]
    content["verdict"]["grounds"][1] |= {"low": None, "high": None, "share": float("nan")}
    still = variation(0)
    still.d_plus.zero_()
    still.d_minus.zero_()
    page = Page(report_html(content, Measured({"original": "a", "unlearned": "b"}, "audit", {"unlearned": still})))
    shown = "".join(page.text)
    assert "No neuron was flagged" in shown
    assert "Relearning" not in shown
    assert not re.search(r"\bnan\b", shown)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_charts_are_well_formed(hostile: str) -> None:
    charts = [
        line_chart(hostile, [Series(hostile, [(0, 1.0), (1, float("nan"))], band=[(0, 0.5, 1.5)])], hostile, hostile),
        line_chart(hostile, [], "", ""),
        heat_map(hostile, {(0, hostile): 1.0, (1, hostile): 0.0}, [hostile], 1.0, "plus"),
        heat_map(hostile, {}, [], 0.0, "minus"),
        scatter(hostile, [(1.0, -2.0)], hostile, hostile),
        scatter(hostile, [], "", ""),
        interval_plot(hostile, [Interval(hostile, 0.5, float("-inf"), float("inf"), "undecided")], 0.1),
    ]
    for chart in charts:
        tree = ET.fromstring(chart)
        assert tree.tag == "svg"
        numbers = [value for element in tree.iter() for value in element.attrib.values() if value in ("nan", "inf")]
        assert numbers == []


def test_a_heat_map_is_darkest_where_the_value_is_highest() -> None:
    tree = ET.fromstring(heat_map("", {(0, "mlp_up"): 0.1, (1, "mlp_up"): 0.4}, ["mlp_up"], 0.4, "plus"))
    shades = {rect[0].text: float(rect.get("fill-opacity", "0")) for rect in tree.iter("rect") if len(rect)}
    assert shades == {"layer 0, mlp_up: 0.1": 0.25, "layer 1, mlp_up: 0.4": 1.0}


def test_lines_go_where_their_values_are() -> None:
    tree = ET.fromstring(line_chart("", [Series("", [(0, 0.0), (10, 100.0)])], "", ""))
    (line,) = tree.iter("polyline")
    start, end = ([float(one) for one in point.split(",")] for point in line.get("points", "").split())
    assert (start[0], end[0]) == (44, 330)
    assert (start[1], end[1]) == (200, 20)
