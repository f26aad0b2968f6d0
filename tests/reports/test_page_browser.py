"""``report.html`` in a real browser: nothing runs, nothing is loaded, nothing sticks out.

Skipped where there is no Chromium with its driver. To look at the pages oneself: set ``LIGHTNING_SSIUU_SCREENSHOTS`` to
a directory, which gets a PNG of each.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toys.leaderboard import board_page
from toys.reports import report, report_without_oracle

webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: it is in the extra [test]")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SIZES = {"phone": (375, 812), "desktop": (1280, 900)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no browser: Chromium with its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


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


def show(browser: Any, page: Path, size: str, scheme: str) -> None:
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"media": "", "features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())


def requests(browser: Any) -> set[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return {url for url in sent if not url.startswith("data:")}


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``, by WCAG 2."""
    parts = [int(part) / 255 for part in colour.strip("rgba()").split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


CONTRASTS = """
return [...document.querySelectorAll('p, td, th, dt, dd, h1, h2, h3, .says, .badge, figcaption, a, svg text')]
  .map(one => {
    let behind = one;
    while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
    const style = getComputedStyle(one);
    return [one.tagName === 'text' ? style.fill : style.color, getComputedStyle(behind).backgroundColor];
  });
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["plain", "hostile", "leaderboard"])
def test_page(browser: Any, pages: dict[str, Path], name: str, size: str, scheme: str) -> None:
    for log in ("browser", "performance"):
        browser.get_log(log)  # of the page before
    show(browser, pages[name], size, scheme)
    assert requests(browser) == {pages[name].as_uri()}
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.hacked") is None
    browser.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
    needed, visible = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert needed <= visible == SIZES[size][0]
    pairs = {tuple(pair) for pair in browser.execute_script(CONTRASTS)}
    for pair in pairs:
        low, high = sorted(map(luminance, pair))
        assert (high + 0.05) / (low + 0.05) >= 4.5, pair
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
    show(browser, pages[name], size, "light")
    cut = browser.execute_script(CUT)
    assert "Table of attacks" not in cut
    assert size == "phone" or cut == []  # on a phone the widest ones scroll in a box of their own


def test_print(browser: Any, pages: dict[str, Path]) -> None:
    """Printed on A4 from a dark screen: on white paper, with no table cut off at the edge."""
    show(browser, pages["plain"], "desktop", "dark")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    metrics = {"width": 718, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    wide = "return [...document.querySelectorAll('table')].map(one => one.getBoundingClientRect().right)"
    assert max(browser.execute_script(wide)) <= 718
