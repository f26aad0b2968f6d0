"""Which version and which commit of this package is running."""

from __future__ import annotations

import json
import os
import subprocess
from configparser import ConfigParser, ParsingError
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

import lightning_ssiuu

DISTRIBUTION = "lightning-ssiuu"
_PATIENCE = 5.0  # seconds for git to answer


@cache
def commit() -> str | None:
    """The commit whose files are running, with ``-dirty`` behind it where some of them were changed; None: not known.

    That of the checkout the package lies in, an editable install's too; else the one that pip was given
    (``pip install git+https://...``, PEP 610). A wheel does not say.
    """
    package = Path(str(lightning_ssiuu.__file__)).resolve().parent
    if (package.parent / ".git").exists() and _is_ours(package.parent):
        return _of_checkout(package)
    with suppress(metadata.PackageNotFoundError):
        installed = metadata.distribution(DISTRIBUTION)
        if Path(str(installed.locate_file(package.name))).resolve() == package:
            return _of_install(installed.read_text("direct_url.json"))
    return None


def _is_ours(root: Path) -> bool:
    # Others' repositories may hold this package, too: copied into them, or with all that is installed.
    described = ConfigParser()
    with suppress(OSError, ValueError, ParsingError):
        described.read_string((root / "setup.cfg").read_text(encoding="utf-8"))
    return described.get("metadata", "name", fallback=None) == DISTRIBUTION


def _of_checkout(package: Path) -> str | None:
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return _git(package, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")


def _git(folder: Path, *words: str) -> str | None:
    # A mounted checkout may belong to somebody else, for whom git would answer nothing; and what runs this (a hook)
    # may have named another repository.
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    given = ["git", "-c", "safe.directory=*", "-C", str(folder), *words]
    try:
        done = subprocess.run(given, capture_output=True, text=True, check=True, timeout=_PATIENCE, env=own)
    except (OSError, subprocess.SubprocessError):  # no git, no commit yet, not in it
        return None
    return done.stdout.strip() or None


def _of_install(direct_url: str | None) -> str | None:
    try:
        return str(json.loads(direct_url or "")["vcs_info"]["commit_id"])
    except (ValueError, KeyError, TypeError):
        return None


def version() -> str:
    """Version, and the commit where it is known.

    Example:
        >>> version().startswith(lightning_ssiuu.__version__)
        True
    """
    known = commit()
    return lightning_ssiuu.__version__ + (f" (commit {known})" if known else "")
