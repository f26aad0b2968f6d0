"""The documentation site: one command builds it offline, nothing in it leads nowhere, and the reference is complete."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml
from toys.browser import SIZES, contrasts, needs_browser, requests, show
from toys.cli import RECIPES, ROOT, default_run
from toys.json_files import undocumented

import lightning_ssiuu
from lightning_ssiuu.__main__ import _COMMANDS
from lightning_ssiuu.evaluation.json_files import JSON_FILES
from lightning_ssiuu.evaluation.results import _RESULTS

DOCS = ROOT / "docs"
#: What a page loads, by tag: the attribute with its address. Links that only lead elsewhere are no resources.
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


class Page(HTMLParser):
    """Anchors, links and resources of a built page, and what switches its colours."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.schemes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in LOADED and LOADED[tag] in given:
            self.resources.append(given[LOADED[tag]])
        if tag == "input" and given.get("name") == "__palette":
            self.schemes.add(given.get("data-md-color-scheme", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as a reader of docs/contributing builds it, with no way to a network."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    build = (sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder)
    environment = os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def navigated(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        inside = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from [inside] if isinstance(inside, str) else navigated(inside)


def test_every_page_is_in_the_navigation_once_and_exists(site: Path) -> None:
    named = list(navigated(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} - {"pypi.md"}  # for the package index
    assert len(named) == len(set(named))
    assert written <= set(named)
    assert all(name.startswith("reference/") for name in set(named) - written)  # made by docs/hooks.py
    assert all((site / name).with_suffix(".html").is_file() for name in named)


def test_links_and_anchors_lead_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    wrong = []
    for path, page in pages.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link) or path.name == "404.html":
                continue
            there = (path.parent / target).resolve() if target else path
            if there.is_dir():
                there /= "index.html"
            if not there.is_file() or (anchor and there in pages and anchor not in pages[there].anchors):
                wrong.append((path.relative_to(site).as_posix(), link))
    assert not wrong


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert page.resources
        assert not [one for one in page.resources if re.match(r"([a-z]+:)?//", one)], path
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", path.read_text(encoding="utf-8")), path


def test_search_and_colours(site: Path, pages: dict[Path, Page]) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert found == {path.relative_to(site).as_posix() for path in pages} - {"404.html"}
    assert all({"default", "slate"} <= page.schemes for page in pages.values())


@pytest.mark.parametrize("name", lightning_ssiuu._EXPORTS)
def test_reference_has_every_public_name(name: str, pages: dict[Path, Page], site: Path) -> None:
    module = lightning_ssiuu._EXPORTS[name]
    page = pages[site / "reference" / f"{module.partition('.')[0]}.html"]
    assert f"lightning_ssiuu.{module}.{name}" in page.anchors


def parser_of(name: str, module: str) -> Any:
    """The parser that a command makes, caught where it would parse."""
    caught = []

    def parse(parser: Any, *_: Any, **__: Any) -> None:
        caught.append(parser)
        raise KeyboardInterrupt

    run = importlib.import_module(module).run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonargparse.ArgumentParser, "parse_args", parse)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)  # doctor's
        with pytest.raises(KeyboardInterrupt):
            run([name] if module.endswith(".fit") else [])
    return caught[0]


@pytest.mark.parametrize("name", [name for name in _COMMANDS if name not in ("validate", "test")])
def test_reference_has_every_option_of_every_command(name: str, site: Path) -> None:
    text = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    section = re.split(r"<h2", text.partition(f'<h2 id="{name}"')[2])[0]
    parser = parser_of(name, _COMMANDS[name][0])
    if name == "fit":
        parser = parser._subcommands_action._name_parser_map["fit"]
    options = {option for action in parser._actions for option in action.option_strings or [action.dest]}
    lightnings = ("--trainer", "--optimizer", "--lr_scheduler", "--weights_only")
    left_out = ("-h", "-c", "--help", "--print_config")
    for option in options:
        is_section = any(other.startswith(f"{option}.") for other in options)
        if not (is_section or option.startswith(lightnings + left_out) or option.endswith((".help", "+"))):
            assert f"<code>{option}</code>" in section, option


@pytest.mark.parametrize("name", ["validate", "test"])
def test_reference_has_the_commands_that_score(name: str, site: Path) -> None:
    assert f'<h2 id="{name}"' in (site / "reference" / "commands.html").read_text(encoding="utf-8")


def test_reference_has_every_recipe(pages: dict[Path, Page], site: Path) -> None:
    names = [path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")]
    assert {name.replace("/", "-") for name in names} <= pages[site / "reference" / "recipes.html"].anchors
    assert "adversary_lr" in (site / "reference" / "recipes.html").read_text(encoding="utf-8")


def test_reference_has_every_json_file(site: Path) -> None:
    text = (site / "reference" / "files.html").read_text(encoding="utf-8")
    assert {name for name in _RESULTS if name.endswith(".json")} - {"TOFU_EVAL.json"} == set(JSON_FILES)
    for file in JSON_FILES.values():
        for name in [*file.fields, *file.sometimes]:
            assert f"<code>{name}</code>" in text


def test_table_of_json_files_is_what_fit_writes() -> None:
    """Of ``erase``, ``attack``, ``audit``, ``certify``: tests/test_wheel.py; of the others their own tests."""
    assert not undocumented(default_run()[0])


MAIN = ("index", "how-to/audit", "how-to/extending", "reference/commands", "evidence/results")


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served, as a search needs it."""
    handler = partial(Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_pages_in_a_browser(browser: Any, address: str, size: str, scheme: str) -> None:
    for name in MAIN:
        browser.get_log("performance")  # of the page before
        show(browser, f"{address}/{name}.html", size, scheme)
        needed, visible = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert needed <= visible == SIZES[size][0], name
        found = contrasts(browser, ".md-content")
        assert min(found.values()) >= 4.5, (name, found)
        assert all(url.startswith(address) for url in requests(browser)), name


@needs_browser
def test_search_finds(browser: Any, address: str) -> None:
    show(browser, f"{address}/index.html?q=UnlearningDepth", "desktop", "light")
    found = "return [...document.querySelectorAll('.md-search-result__link')].map(one => one.pathname)"
    for _ in range(100):
        if links := browser.execute_script(found):
            break
        browser.execute_async_script("setTimeout(arguments[0], 100)")
    assert "/reference/attacks.html" in links
