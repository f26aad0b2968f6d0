"""Stages: commands that are run once, kept under what they depend on, and taken up again after a kill.

A stage's key is a digest of its words, of the contents of the files they name, and of the keys of the stages it needs:
another attack grid is another attack, on the same models. A stage is finished when its ``stage.json`` is there.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from lightning_ssiuu.utils.files import write_json

#: What an interrupted command goes on from; anything else it left is in its way.
_TAKEN_UP = ("checkpoints", "config.yaml", "attack.*.partial.jsonl", "attempts.json", "log.txt")
_PLACE = re.compile(r"\{(\w+)(?::(\w+))?\}")


@dataclass(frozen=True, eq=False)
class Stage:
    """One command.

    ``words`` may hold ``{own}``, the stage's directory, ``{name}``, that of a stage in ``needs``, and ``{name:score}``,
    the forget score that stage ended with, in percent. ``product`` is what other stages need of it, beside its figures.
    """

    kind: str
    name: str
    words: tuple[str, ...]
    needs: Mapping[str, Stage] = field(default_factory=dict)
    product: str | None = None

    @cached_property
    def key(self) -> str:
        needed = {name: stage.key for name, stage in sorted(self.needs.items())}
        content = [self.kind, [_content(word) for word in self.words], needed]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@cache
def _content(word: str) -> str:
    """A word, or the digest of the file or directory it names: where that lies decides nothing."""
    path = Path(word)
    if len(word) > 255 or not path.exists() or path == Path():
        return word
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


class Store:
    """The stages of an output directory: where each lies and what became of it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, stage: Stage) -> Path:
        return self.root / "stages" / stage.kind / f"{stage.name}-{stage.key[:10]}"

    def record(self, stage: Stage) -> dict[str, Any] | None:
        """What was written when it ended, finished or failed; None while it has not."""
        path = self.folder(stage) / "stage.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def is_finished(self, stage: Stage) -> bool:
        record = self.record(stage)
        return record is not None and not record["failed"]

    def is_there(self, stage: Stage) -> bool:
        """Whether it is finished, and what others need of it was not deleted."""
        return self.is_finished(stage) and (stage.product is None or (self.folder(stage) / stage.product).exists())

    def failure(self, stage: Stage) -> str | None:
        """Why it, or one it needs, ended with a mistake; None if none did."""
        failures = (failure for need in stage.needs.values() if (failure := self.failure(need)))
        if failure := next(failures, None):
            return failure
        record = self.record(stage)
        return f"{stage.kind} {stage.name}: {record['failed']}" if record and record["failed"] else None

    def read(self, stage: Stage, name: str) -> dict[str, Any] | None:
        """A result of a stage, None where it has none."""
        path = self.folder(stage) / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def words(self, stage: Stage) -> list[str]:
        """The command, as it is run."""

        def value(match: re.Match[str]) -> str:
            name, score = match.groups()
            if name != "own" and name not in stage.needs:  # {question} in a template
                return match[0]
            folder = self.folder(stage if name == "own" else stage.needs[name])
            if score is None:
                return str(folder)
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            return f"{metrics['after']['scores']['forget'][score]:.6g}"

        return [_PLACE.sub(value, word) for word in stage.words]

    def command(self, stage: Stage) -> str | None:
        """The same for a shell; None as long as it is not known."""
        return shlex.join(self.words(stage)) if all(map(self.is_finished, stage.needs.values())) else None

    def begin(self, stage: Stage) -> Path:
        """Make the directory ready for an attempt: what the command itself can go on from stays."""
        folder = self.folder(stage)
        folder.mkdir(parents=True, exist_ok=True)
        kept = {path for pattern in _TAKEN_UP for path in folder.glob(pattern)}
        for path in set(folder.iterdir()) - kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(folder / "attempts.json", {"attempts": self.attempts(stage) + 1})
        return folder

    def attempts(self, stage: Stage) -> int:
        """How often it was begun."""
        return (self.read(stage, "attempts.json") or {"attempts": 0})["attempts"]

    def end(self, stage: Stage, cpu_seconds: float, wall_seconds: float, failed: str | None = None) -> None:
        """Write the record. CPU seconds are those of the last attempt, the cost only where there was one alone."""
        shutil.rmtree(self.folder(stage) / "checkpoints", ignore_errors=True)
        figures = {"cpu_seconds": cpu_seconds, "wall_seconds": wall_seconds, "attempts": self.attempts(stage)}
        content = {"kind": stage.kind, "name": stage.name, "key": stage.key, "failed": failed, **figures}
        write_json(self.folder(stage) / "stage.json", content | {"command": self.command(stage)})

    def forget(self, stage: Stage) -> None:
        """Have it run again."""
        shutil.rmtree(self.folder(stage), ignore_errors=True)

    def drop_product(self, stage: Stage) -> None:
        """Delete what others need of it; its figures stay."""
        if stage.product is not None:
            shutil.rmtree(self.folder(stage) / stage.product, ignore_errors=True)

    def past_seconds(self, kind: str) -> list[float]:
        """What finished stages of a kind took."""
        records = (json.loads(path.read_text(encoding="utf-8")) for path in self._records(kind))
        return [record["wall_seconds"] for record in records if not record["failed"]]

    def _records(self, kind: str) -> Iterator[Path]:
        return (self.root / "stages" / kind).glob("*/stage.json")
