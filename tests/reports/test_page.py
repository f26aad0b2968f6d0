"""``report.html``: complete, self-contained, and inert whatever stands in names and data."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import asdict
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import matplotlib
import pytest
from toys.reports import HOSTILE, audit_content, report, variation

from lightning_ssiuu.attacks.curves import RecoveryCurve, table
from lightning_ssiuu.reports.audit.page import Measured, report_html
from lightning_ssiuu.utils.figures import (
    COLOURS,
    DASHED,
    PALETTE,
    HeatMap,
    Interval,
    Series,
    heat_map_figure,
    interval_plot,
    line_chart,
    scatter,
)
from lightning_ssiuu.utils.svg import svg

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


@pytest.mark.parametrize("hostile", [*HOSTILE, "$\\frac$ 50 $", "_hidden", "語 ق", ""])
def test_pictures_are_well_formed_and_their_names_text(hostile: str) -> None:
    band = [(0, 0.5, 1.5), (1, 1.0, 2.0)]
    figures = [
        line_chart([Series(hostile, [(0, 1.0), (1, float("nan"))], band=band)], hostile, hostile),
        line_chart([], "", ""),
        heat_map_figure([HeatMap(hostile, {(0, hostile): 1.0, (1, hostile): 0.0}, [hostile], 1.0, COLOURS["erased"])]),
        heat_map_figure([HeatMap("", {}, [], 0.0, COLOURS["hidden"])]),
        scatter([(1.0, -2.0)], hostile, hostile),
        scatter([], "", ""),
        interval_plot([Interval(hostile, 0.5, float("-inf"), float("inf"), COLOURS["undecided"])], 0.1, hostile),
    ]
    for figure in figures:
        tree = ET.fromstring(picture := svg(figure, hostile))
        assert {element.tag for element in tree.iter()} <= {"svg", "path", "text", "title"}
        allowed = {"viewBox", "role", "aria-label", "d", "style", "transform", "x", "y"}
        assert {name for element in tree.iter() for name in element.attrib} <= allowed
        drawn = " ".join(value for element in tree.iter() for name, value in element.items() if name != "aria-label")
        assert not re.search(r"nan|inf|url|#", drawn)  # every colour is one of the page's
        assert picture == svg(figure, hostile)
    shown = hostile.translate({0: "\ufffd", 0x1B: "\ufffd"})
    for figure in (figures[0], figures[2], figures[4], figures[6]):
        texts = [text.text or "" for text in ET.fromstring(svg(figure, "")).iter("text")]
        assert any(text.strip() and shown.startswith(text.strip().removesuffix("…")) for text in texts) or not hostile
        assert max(map(len, texts)) <= 48


def test_a_heat_map_is_darkest_where_the_value_is_highest() -> None:
    values = {(0, "mlp_up"): 0.1, (1, "mlp_up"): 0.4, (2, "mlp_up"): 0.0}
    tree = ET.fromstring(svg(heat_map_figure([HeatMap("", values, ["mlp_up"], 0.4, COLOURS["erased"])]), ""))
    shades = {cell[0].text: cell.get("style") for cell in tree.iter("path") if len(cell)}
    assert shades == {
        "layer 0, mlp_up: 0.1": "fill:var(--erased);opacity:0.25",
        "layer 1, mlp_up: 0.4": "fill:var(--erased)",
        "layer 2, mlp_up: 0": "fill:var(--faint)",
    }


def test_lines_go_where_their_values_are_and_differ_without_colour() -> None:
    series = [
        Series("a", [(0, 0.0), (10, 100.0)], COLOURS["unlearned"]),
        Series("b", [(0, 100.0), (10, 0.0)], COLOURS["oracle"], DASHED),
    ]
    tree = ET.fromstring(svg(line_chart(series, "epoch", "%"), ""))
    lines = {line[0].text: line for line in tree.iter("path") if len(line)}
    ends = {
        name: [[float(number) for number in point.split()] for point in line.get("d", "").strip("M").split("L")]
        for name, line in lines.items()
    }
    labels = {text.text: text for text in tree.iter("text")}
    (left, bottom), (right, top) = ends["a"]
    assert ends["b"] == [[left, top], [right, bottom]]
    assert [float(labels[tick].get("y", 0)) - y for tick, y in (("0", bottom), ("100", top))] == [
        pytest.approx(4, abs=1)
    ] * 2
    assert float(labels["10"].get("x", 0)) == pytest.approx(right, abs=0.2)
    assert "stroke-dasharray" not in lines["a"].get("style", "")
    assert "stroke-dasharray" in lines["b"].get("style", "")
    assert sum("stroke-dasharray" in path.get("style", "") for path in tree.iter("path")) == 2  # in the legend, too


def test_bounds_stand_where_their_values_are() -> None:
    unknown_bounds = (float("-inf"), float("inf"))
    intervals = [
        Interval("known", 0.5, 0.2, 0.8, COLOURS["hidden"]),
        Interval("one", 0.0, *unknown_bounds, COLOURS["erased"]),
    ]
    tree = ET.fromstring(svg(interval_plot(intervals, 0.1, "%"), ""))
    places = {text.text: float(text.get("x", 0)) for text in tree.iter("text")}
    assert {"50 %", "0 %"} <= set(places)
    known, unknown = (path for path in tree.iter("path") if "stroke-width:3" in path.get("style", ""))
    for path, ends in ((known, ("20", "80")), (unknown, ("-20", "100"))):
        drawn = [float(point.split()[0]) for point in path.get("d", "").strip("M").split("L")]
        assert drawn == pytest.approx([places[end] for end in ends], abs=0.2)
    assert "dasharray" not in known.get("style", "")
    assert "dasharray" in unknown.get("style", "")


def test_a_page_finds_every_colour_of_a_figure() -> None:
    assert len({light for light, _ in PALETTE.values()}) == len(PALETTE)
    plain = report(hostile=False)
    used = set(re.findall(r"var\(--([\w]+)\)", plain))
    for name in used - {"tone", "ink", "soft", "rule"}:
        assert len(re.findall(rf"--{name}: #", plain)) == 3, name  # light, dark, print


def test_figures_leave_matplotlib_as_it_was() -> None:
    """No window system, no figure kept open, and the user's own configuration neither heeded nor changed."""
    figure = line_chart([Series("a $ b", [(0, 1.0)])], "x", "y")
    usual = svg(figure, "")
    with matplotlib.rc_context({"text.usetex": True, "svg.fonttype": "path", "font.size": 30}):
        assert svg(line_chart([Series("a $ b", [(0, 1.0)])], "x", "y"), "") == usual
        assert matplotlib.rcParams["font.size"] == 30
    assert "matplotlib.pyplot" not in sys.modules or sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_attackers_their_control_and_what_they_leave_are_shown() -> None:
    def curve(name: str, top: float, **more: Any) -> RecoveryCurve:
        return RecoveryCurve(name, "harmful", 0.1, 1e-3, 0, 4, 32, [0, 3, 4], [9.0, 20.0, top], **more)

    utility = {"retain": [90.0, 91.0, 33.3], "test": [80.0, 81.0, 22.2]}
    by_sgd = curve("unlearned", 44.0, attacker={"optimizer": "sgd", "repair_epochs": 3}, utility=utility)
    found = [curve("unlearned", 30.0, utility=utility), by_sgd, curve("control", 12.0)]
    content = audit_content(hostile=False)
    content["relearning"]["attacks"] = [{"attack": "harmful", "score": "probability"} | row for row in table(found)]
    content["relearning"]["curves"] = [{"attack": "harmful"} | asdict(one) for one in found]
    page = report_html(content, Measured({"original": "o", "unlearned": "a"}, "audit", {"unlearned": variation(0)}))
    text = " ".join(" ".join(Page(page).text).split())
    assert (
        "Of 2 attackers in the harmful attack with 10 % of the forget set, the highest is by sgd, repair epochs 3"
        in text
    )
    assert "unlearned, sgd, repair epochs 3, lr 0.001" in text
    assert "control, lr 0.001" in text
    assert "Control: the unlearned model under the same attack on facts that nobody was ever taught." in text
    assert "retain then, % test then, %" in text
    assert "44.0 ± 0.0 33.3 22.2" in text
    assert "unlearned, retain set" in text
    assert "unlearned, test set" in text
