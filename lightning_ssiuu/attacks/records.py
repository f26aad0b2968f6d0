"""What attacks leave on disk: ``attack.json``, which several share, and the finished part of an interrupted sweep."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_ssiuu.attacks.base import Outcome
from lightning_ssiuu.attacks.curves import RecoveryCurve
from lightning_ssiuu.evaluation.results import check_attacks, described
from lightning_ssiuu.models.loading import adapter_base, plain_configuration, resolve_checkpoint
from lightning_ssiuu.utils.files import write_json
from lightning_ssiuu.utils.reading import only, read_json, reading

REPORT = "attack.json"

#: Lists of ``attack.json`` whose entries name their attack.
_LISTS = ("attacks", "curves", "outcomes")
_HEAD = b'{"fingerprint": "'
#: What tells the attacks of one sweep apart: model, p, seed, attacker, learning rate, epochs.
Cell = tuple[str, float | None, int, str, float, int]


def read_attacks(folder: Path, argument: str = "output") -> dict[str, Any]:
    """The ``attack.json`` of a directory, or an empty one; one that this version did not write is a UserError."""
    if not os.path.lexists(folder / REPORT):
        return {**{name: [] for name in _LISTS}, "settings": {}}
    allowed = f"a directory whose {REPORT} is of this version"
    return read_json(folder / REPORT, argument, allowed=allowed, check=_check_whole)


def _check_whole(content: Mapping[str, Any]) -> None:
    only(dict, content["settings"])
    for name in _LISTS:
        only(str, *(entry["attack"] for entry in content[name]))
    check_attacks(content)
    for row in content["attacks"]:  # what an audit asks of those that trained
        if row["n_attack"] is not None:
            seeds = row["unlearned"]["forget_score"]["per_seed"], row["unlearned"]["before"]["per_seed"]
            only((int, float, type(None)), *seeds[0], *seeds[1])


def merge_attacks(
    folder: Path,
    attack: str,
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    results: Sequence[RecoveryCurve | Outcome],
) -> None:
    """Put an attack's entries into ``attack.json`` in place of those it had; other attacks' stay."""
    content = read_attacks(folder)
    curves = [asdict(result) for result in results if isinstance(result, RecoveryCurve)]
    outcomes = [asdict(result) for result in results if isinstance(result, Outcome)]
    for name, entries in {"attacks": rows, "curves": curves, "outcomes": outcomes}.items():
        kept = [entry for entry in content[name] if entry["attack"] != attack]
        content[name] = kept + [{"attack": attack, **entry} for entry in entries]
    content["settings"][attack] = settings
    write_json(folder / REPORT, content)


class FinishedAttacks:
    """The finished curves of an interrupted sweep, one a line in a file beside ``attack.json``.

    A line is on the disk before the next attack begins. The first one is the digest of everything that determines the
    curves: another sweep's file is never continued. A line that a killed process left half written does not count.
    With ``anew`` what is there goes before the first curve is written. ``finished`` are the curves to go on from, the
    same on every rank; ``saved`` is where the attacked unlearned model with the highest score goes.
    """

    def __init__(self, path: Path, fingerprint: str, saved: Path | None = None) -> None:
        self.path, self.fingerprint, self.saved = path, fingerprint, saved
        self.anew = self._begun = False
        self.finished: dict[Cell, RecoveryCurve] = {}

    def read(self) -> dict[Cell, RecoveryCurve] | None:
        """The finished curves; None if the file is another sweep's, or damaged. Writes nothing.

        Raises:
            UserError: If it is the file of no sweep.
        """
        if not os.path.lexists(self.path):
            return {}
        with reading("output", str(self.path), "no such file, or that of an interrupted sweep", quote=False):
            lines = self._whole_lines()
            if not lines:  # killed within the first: the half of what begin() writes, or nothing at all
                half = self.path.read_bytes()[: len(_HEAD)]
                if not _HEAD.startswith(half):
                    raise ValueError("of something else")
                return {}
            head = json.loads(lines[0])
            only(str, head["fingerprint"])
        if head != {"fingerprint": self.fingerprint}:
            return None
        try:
            curves = [_curve(json.loads(line)) for line in lines[1:]]
        except (ValueError, TypeError, LookupError, RecursionError):
            return None
        return {cell(curve): curve for curve in curves}

    def begin(self) -> None:
        """Make the file ready to append to, once: a half line goes."""
        if self._begun:
            return
        self._begun = True
        lines = [] if self.anew else self._whole_lines()
        if not lines:
            self._begin_file()
        else:
            with self.path.open("r+b") as file:
                file.truncate(sum(map(len, lines)))

    def _begin_file(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(b"")
        self._append({"fingerprint": self.fingerprint})

    def add(self, curve: RecoveryCurve) -> None:
        if not self.path.exists():  # somebody removed the directory: what comes now is kept again
            self._begin_file()
        self._append(asdict(curve))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _append(self, content: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(content).encode() + b"\n")  # floats as they are, NaN too
            file.flush()
            os.fsync(file.fileno())

    def _whole_lines(self) -> list[bytes]:
        if not self.path.exists():
            return []
        return [line for line in self.path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _curve(content: Mapping[str, Any]) -> RecoveryCurve:
    curve = RecoveryCurve(**content)
    only(str, curve.model, curve.kind)
    only(dict, curve.attacker)
    only((int, float), curve.p or 0.0, curve.learning_rate, *curve.forget_scores)
    only(int, curve.seed, curve.n_attack, curve.n_scored, *curve.epochs)
    only((int, float), *(value for values in curve.utility.values() for value in values))
    if not 0 < len(curve.epochs) == len(curve.forget_scores):
        raise ValueError("a curve whose epochs and scores differ in number")
    return curve


def cell(curve: RecoveryCurve) -> Cell:
    """The run of a sweep that a curve is of."""
    return curve.model, curve.p, curve.seed, described(curve.attacker), curve.learning_rate, curve.epochs[-1]


def fingerprint(content: Any) -> str:
    """SHA-256 hex digest of JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checkpoint_fingerprint(checkpoint: str) -> str:
    """Digest of a saved model: of every file in its directory, or of a hub model's id and commit."""
    folder = Path(resolve_checkpoint(checkpoint))
    if not folder.is_dir():
        return f"{folder} {getattr(plain_configuration(checkpoint), '_commit_hash', None)}"
    # Size and date would not tell a model from another one put in its place, and reading the weights costs little.
    digests = {}
    for file in sorted(folder.iterdir()):
        if file.is_file():
            with file.open("rb") as opened:
                digests[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    if (base := adapter_base(checkpoint)) is not None:
        digests["base"] = checkpoint_fingerprint(base)
    return fingerprint(digests)
