"""What is renamed was synced before, and the rename itself after: a power cut leaves the old or the new, whole."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lightning_ssiuu.utils.files import disk_refusal, write_json, written_atomically


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """``("sync", path)`` and ``("rename", new path)`` in the order in which they reach the kernel."""
    happened: list[tuple[str, str]] = []
    paths: dict[int, str] = {}
    opened, synced, replaced, renamed = os.open, os.fsync, os.replace, os.rename

    def note_open(path: Any, *arguments: Any, **options: Any) -> int:
        descriptor = opened(path, *arguments, **options)
        paths[descriptor] = os.fspath(path)
        return descriptor

    def note_sync(descriptor: int) -> None:
        happened.append(("sync", Path(paths[descriptor]).name))
        synced(descriptor)

    def note_replace(source: Any, target: Any) -> None:
        happened.append(("rename", f"{Path(source).name} to {Path(target).name}"))
        replaced(source, target)

    def note_rename(source: Any, target: Any) -> None:
        happened.append(("rename", f"{Path(source).name} to {Path(target).name}"))
        renamed(source, target)

    monkeypatch.setattr(os, "open", note_open)
    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(os, "rename", note_rename)
    return happened


def test_a_file_is_on_the_disk_before_it_is_renamed(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    with written_atomically(tmp_path / "a.json") as temporary:
        temporary.write_text("whole")
        assert events == []
    assert events == [("sync", "a.json"), ("rename", "a.json to a.json"), ("sync", tmp_path.name)]


def test_a_folder_is_on_the_disk_with_all_that_is_in_it(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    def write() -> None:
        with written_atomically(tmp_path / "model") as temporary:
            (temporary / "inner").mkdir(parents=True)
            (temporary / "weights").write_text("w")
            (temporary / "inner" / "config").write_text("c")

    inside = {("sync", name) for name in ("weights", "inner", "config", "model")}
    write()
    assert set(events[:4]) == inside
    assert events[4:] == [("rename", "model to model"), ("sync", tmp_path.name)]
    events.clear()
    write()  # in place of the one that is there
    assert set(events[:4]) == inside
    assert events[4:] == [("rename", "model to old"), ("rename", "model to model"), ("sync", tmp_path.name)]


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"n": 1, "diverged": [float("nan"), float("-inf")]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"n": 1, "diverged": [None, None]}


def test_only_a_disk_that_refuses_is_the_users() -> None:
    refusal = disk_refusal(OSError(errno.ENOSPC, "No space left on device"), "runs/a")
    assert str(refusal) == (
        "output directory: got 'runs/a', allowed: one that can be written (No space left on device)"
    )
    assert disk_refusal(FileNotFoundError(errno.ENOENT, "No such file"), "runs/a") is None
