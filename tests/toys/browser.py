"""A real browser, where there is one: Chromium with its driver."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SIZES = {"phone": (375, 812), "desktop": (1280, 900)}


def _program() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


_MISSING = (
    "no selenium: it is in the extra [test]"
    if find_spec("selenium") is None
    else "no browser: Chromium with its driver"
    if _program() is None or shutil.which("chromedriver") is None
    else None
)
#: For the tests themselves, whose file .ci/run looks for among those that were skipped.
needs_browser = pytest.mark.skipif(_MISSING is not None, reason=_MISSING or "")


@contextmanager
def open_browser() -> Iterator[Any]:
    """A browser without a window."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = _program()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield started
    finally:
        started.quit()


def show(browser: Any, page: str, size: str, scheme: str) -> None:
    """Open an address in a window of one of the sizes, in light or dark."""
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"media": "", "features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page)


def requests(browser: Any) -> set[str]:
    """What was asked for since the log was last read."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return {url for url in sent if not url.startswith(("data:", "blob:"))}


def luminance(colour: str, behind: str = "rgb(255, 255, 255)") -> float:
    """Relative luminance of ``rgb(r, g, b)`` or ``rgba(r, g, b, a)`` on what is behind it, by WCAG 2."""
    (own, ground) = ([float(part) for part in text.strip("rgba()").split(",")] for text in (colour, behind))
    alpha = own[3] if len(own) > 3 else 1.0
    parts = [(alpha * over + (1 - alpha) * under) / 255 for over, under in zip(own[:3], ground[:3], strict=True)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


_CONTRASTS = """
return [...document.querySelector(arguments[0])
    .querySelectorAll('p, td, th, dt, dd, li, h1, h2, h3, .says, .badge, figcaption, a, code, pre span, svg text')]
  .filter(one => getComputedStyle(one).opacity !== '0')
  .map(one => {
    let behind = one;
    while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
    const style = getComputedStyle(one);
    return [one.tagName === 'text' ? style.fill : style.color, getComputedStyle(behind).backgroundColor];
  });
"""


def contrasts(browser: Any, inside: str) -> dict[tuple[str, str], float]:
    """Contrast of every text colour on the one behind it, by WCAG 2: 21 is black on white."""
    pairs = {tuple(pair) for pair in browser.execute_script(_CONTRASTS, inside)}
    found = {}
    for pair in pairs:
        low, high = sorted((luminance(*pair), luminance(pair[1])))
        found[pair] = (high + 0.05) / (low + 0.05)
    return found
