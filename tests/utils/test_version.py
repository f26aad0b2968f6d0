"""Version and commit: of a checkout, of what pip was given, of neither."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from toys.cli import command

import lightning_ssiuu
from lightning_ssiuu.utils.provenance import provenance
from lightning_ssiuu.utils.version import commit, version


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package, as far as it can tell, lies in a directory of its own."""
    folder = tmp_path / "place" / "lightning_ssiuu"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    monkeypatch.setattr(lightning_ssiuu, "__file__", str(folder / "__init__.py"))
    commit.cache_clear()
    yield folder
    commit.cache_clear()


def git(folder: Path, *words: str) -> str:
    name = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    done = subprocess.run(["git", *name, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_a_checkout(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = package.parent
    (place / "setup.cfg").write_text("[metadata]\nname = lightning-ssiuu\n")
    git(place, "init")
    assert commit() is None  # there is none yet
    commit.cache_clear()
    git(place, "add", ".")
    git(place, "commit", "-m", "first")
    git(place, "tag", "v1")  # a tag is no commit
    head = git(place, "rev-parse", "HEAD")
    assert commit() == head
    assert version() == f"{lightning_ssiuu.__version__} (commit {head})"
    assert command("--version").out == f"{version()}\n"
    monkeypatch.setenv("GIT_DIR", str(place / "nowhere"))  # as a hook of another repository has it
    commit.cache_clear()
    assert commit() == head
    monkeypatch.delenv("GIT_DIR")
    assert provenance(1.0, "cpu")["commit"] == head
    assert provenance(1.0, "cpu")["versions"]["lightning-ssiuu"] == lightning_ssiuu.__version__
    commit.cache_clear()
    (package / "__init__.py").write_text("changed = True\n")
    assert commit() == f"{head}-dirty"
    commit.cache_clear()
    (package / "__init__.py").write_text("")
    environment = package.parent / "deeper" / "site-packages" / "lightning_ssiuu"  # somebody else's checkout
    shutil.copytree(package, environment)
    lightning_ssiuu.__file__ = str(environment / "__init__.py")
    assert commit() is None


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_a_repository_of_something_else(package: Path) -> None:
    """That holds this package among its own files, or in which somebody unpacked it."""
    place = package.parent
    git(place, "init")
    git(place, "add", ".")
    git(place, "commit", "-m", "all that is installed here")
    assert commit() is None
    (place / "setup.cfg").write_text("[metadata]\nname = lightning-ssiuu\n")
    git(place, "rm", "--cached", "-r", "lightning_ssiuu")
    git(place, "commit", "-m", "something else")
    commit.cache_clear()
    assert commit() is None


@pytest.mark.parametrize(
    ("direct", "found"),
    [
        ({"url": "https://example.org/x", "vcs_info": {"vcs": "git", "commit_id": "1" * 40}}, "1" * 40),
        ({"url": "file:///wheels/x.whl", "archive_info": {}}, None),
        (None, None),
    ],
)
def test_what_pip_was_given(package: Path, monkeypatch: pytest.MonkeyPatch, direct: object, found: str | None) -> None:
    told = package.parent / "lightning_ssiuu-0.1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning-ssiuu\nVersion: 0.1.0\n")
    if direct is not None:
        (told / "direct_url.json").write_text(json.dumps(direct))
    monkeypatch.syspath_prepend(package.parent)
    assert commit() == found
    commit.cache_clear()
    monkeypatch.setattr(lightning_ssiuu, "__file__", str(package.parent.parent / "other" / "__init__.py"))
    assert commit() is None  # another one is running than the one installed
