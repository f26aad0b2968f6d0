"""The fenced blocks of the documents, and the commands in them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from toys.cli import ROOT

ROOT_PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = [*ROOT_PAGES, *sorted((ROOT / "docs").rglob("*.md"))]
#: Marks of what is run with nothing but the package installed (tests/test_wheel.py).
WALKS = ("newcomer", "privacy-engineer", "researcher")
BASH = shutil.which("bash") or "bash"
_BLOCK = re.compile(r"(?:^<!-- ([\w-]+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: the page and line where it begins, its language, and the comment before it."""

    page: str
    line: int
    marker: str | None
    language: str
    text: str


def blocks_of(page: Path) -> Iterator[Block]:
    """The blocks of a page in their order."""
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        yield Block(page.relative_to(ROOT).as_posix(), text.count("\n", 0, match.start(3)), *match.groups())


def shown_commands(text: str) -> list[list[str]]:
    """The commands of a bash block as bash would start them: loops and variables expanded, nothing started."""
    script = """
    lightning-ssiuu() { printf '%s\\0' lightning-ssiuu "$@"; echo; }
    python() { printf '%s\\0' python "$@"; echo; }
    """
    # Without a PATH there is nothing else that could be started.
    options: Any = {"env": {"PATH": ""}, "capture_output": True, "text": True, "check": False}
    done = subprocess.run([BASH, "-c", script + text.replace("<name>", "npo")], **options)
    return [line.split("\0")[:-1] for line in done.stdout.splitlines()]
