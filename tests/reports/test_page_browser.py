"""``report.html`` in a real browser: nothing runs, nothing is loaded, nothing sticks out.

Skipped where there is no Chromium with its driver. To look at the pages oneself: set ``LIGHTNING_SSIUU_SCREENSHOTS`` to
a directory, which gets a PNG of each.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import pytest
from toys.browser import SIZES, contrasts, luminance, needs_browser, requests, show
from toys.leaderboard import board_page
from toys.reports import report, report_without_oracle

pytestmark = needs_browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    written = {}
    for name, hostile in (("plain", False), ("hostile", True)):
        written[name] = folder / f"{name}.html"
        written[name].write_text(report(hostile), encoding="utf-8")
    for name, control in (("alone", False), ("control", True)):
        written[name] = folder / f"{name}.html"
        written[name].write_text(report_without_oracle(control), encoding="utf-8")
    written["leaderboard"] = folder / "leaderboard.html"
    written["leaderboard"].write_text(board_page(folder / "audits"), encoding="utf-8")
    return written


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["plain", "hostile", "leaderboard"])
def test_page(browser: Any, pages: dict[str, Path], name: str, size: str, scheme: str) -> None:
    for log in ("browser", "performance"):
        browser.get_log(log)  # of the page before
    show(browser, pages[name].as_uri(), size, scheme)
    assert requests(browser) == {pages[name].as_uri()}
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.hacked") is None
    browser.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
    needed, visible = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert needed <= visible == SIZES[size][0]
    pairs = contrasts(browser, "body")
    assert min(pairs.values()) >= 4.5, pairs
    assert len({behind for _, behind in pairs}) >= 2
    dark = luminance(browser.execute_script("return getComputedStyle(document.body).backgroundColor")) < 0.5
    assert dark == (scheme == "dark")
    if folder := os.environ.get("LIGHTNING_SSIUU_SCREENSHOTS"):
        taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})
        Path(folder, f"report_{name}_{size}_{scheme}.png").write_bytes(base64.b64decode(taken["data"]))


CUT = """
return [...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth)
  .map(one => one.getAttribute('aria-label'));
"""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["plain", "alone", "control"])
def test_no_table_is_cut(browser: Any, pages: dict[str, Path], name: str, size: str) -> None:
    show(browser, pages[name].as_uri(), size, "light")
    cut = browser.execute_script(CUT)
    assert "Table of attacks" not in cut
    assert size == "phone" or cut == []  # on a phone the widest ones scroll in a box of their own


def test_print(browser: Any, pages: dict[str, Path]) -> None:
    """Printed on A4 from a dark screen: on white paper, with no table cut off at the edge."""
    show(browser, pages["plain"].as_uri(), "desktop", "dark")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    metrics = {"width": 718, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    wide = "return [...document.querySelectorAll('table')].map(one => one.getBoundingClientRect().right)"
    assert max(browser.execute_script(wide)) <= 718
