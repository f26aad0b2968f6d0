"""Which version and which commit of this package is running."""

from __future__ import annotations

import json
import subprocess
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
    if (package.parent / ".git").exists():
        return _of_checkout(package.parent)
    with suppress(metadata.PackageNotFoundError):
        installed = metadata.distribution(DISTRIBUTION)
        if Path(str(installed.locate_file(package.name))).resolve() == package:
            return _of_install(installed.read_text("direct_url.json"))
    return None


def _of_checkout(root: Path) -> str | None:
    # A mounted checkout may belong to somebody else, for whom git would answer nothing.
    words = ["git", "-c", "safe.directory=*", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run([*words, "--dirty"], capture_output=True, text=True, check=True, timeout=_PATIENCE)
    except (OSError, subprocess.SubprocessError):  # no git, or no commit yet
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
