"""What a run's directory says of one saved model: only what was measured on these weights and these data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lightning_ssiuu.evaluation.results import check_attacks, check_metrics, read_result, read_sections
from lightning_ssiuu.models.digest import weights_sha256
from lightning_ssiuu.utils.reading import only


@dataclass(frozen=True)
class Findings:
    """The records of a run about one of its models; empty where there are none.

    Args:
        weights: Digest of the model's weights (:func:`~lightning_ssiuu.models.digest.weights_sha256`).
        metrics: ``metrics.json``.
        config: ``config.yaml``.
        attacks: Rows of ``attack.json``, else of the audit's own small attack.
        runs: The curves and outcomes behind the rows.
        audit: ``audit.json``.
        certificate: The bytes of ``certificate.json``; None: there is none that may be handed out.
        left_out: What is in the directory and does not count, with the reason.
    """

    weights: str
    metrics: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    attacks: tuple[Mapping[str, Any], ...] = ()
    runs: tuple[Mapping[str, Any], ...] = ()
    audit: Mapping[str, Any] = field(default_factory=dict)
    certificate: bytes | None = None
    left_out: tuple[str, ...] = ()

    def seeds(self, row: Mapping[str, Any]) -> list[int]:
        """The seeds of a row's attack on the unlearned model, in order.

        Example:
            >>> runs = tuple({"attack": "harmful", "model": "unlearned", "p": 0.3, "seed": seed} for seed in (1, 0))
            >>> Findings("", runs=runs).seeds({"attack": "harmful", "p": 0.3})
            [0, 1]
        """
        own = [run for run in self.runs if run["attack"] == row["attack"] and run["model"] == "unlearned"]
        same = [run for run in own if all(run.get(name) == row.get(name) for name in ("p", "variant"))]
        return sorted({run["seed"] for run in same})

    def counted(self, row: Mapping[str, Any]) -> bool:
        """Whether the verdict rests on a row, too."""
        rows = (self.audit.get("relearning") or {}).get("attacks") or []
        return any(all(row[name] == other[name] for name in ("attack", "p", "score")) for other in rows)


def findings_of(run: Path, model: Path, argument: str = "run") -> Findings:
    """Gather what a directory has about a model in it.

    An attack, audit or certificate of other weights or other data is left out, and so is a certificate that holds the
    ids as they are, or a path: it is sealed, and nothing can be taken from it.

    Raises:
        UserError: About ``argument``, if a file is not of this version, or there is no such model.
    """
    weights = weights_sha256(str(model), argument)
    there = {name: run / name for name in ("metrics.json", "config.yaml", "attack.json", "audit.json")}
    there = {name: path for name, path in there.items() if path.is_file()}
    metrics = read_result(there["metrics.json"], argument, check_metrics) if "metrics.json" in there else {}
    config = read_sections(run, argument) if "config.yaml" in there else {}
    data = (metrics.get("provenance") or {}).get("data_sha256")
    left_out: list[str] = []

    def is_of_this(name: str, content: Mapping[str, Any]) -> bool:
        provenance = content.get("provenance") or {}
        digests = provenance.get("weights_sha256") or {}
        if digests.get("unlearned", digests.get("model")) != weights:
            left_out.append(f"{name}: it is of other weights")
        elif data is not None and provenance.get("data_sha256") != data:
            left_out.append(f"{name}: it is of other data than metrics.json")
        else:
            return True
        return False

    audit = read_result(there["audit.json"], argument, _check_audit) if "audit.json" in there else {}
    audit = audit if audit and is_of_this("audit.json", audit) else {}
    attacks = read_result(there["attack.json"], argument, check_attacks) if "attack.json" in there else {}
    made = attacks.get("settings") or {}
    kept = {name for name, settings in made.items() if is_of_this(f"attack.json ({name})", settings)}
    rows, runs = _of(attacks, kept)
    if not rows:
        probe = audit.get("relearning") or {}
        rows, runs = _of(probe, {row["attack"] for row in probe.get("attacks", [])})
    certificate = _certificate(run / "certificate.json", argument, weights, left_out)
    return Findings(weights, metrics, config, rows, runs, audit, certificate, tuple(left_out))


def _of(content: Mapping[str, Any], kept: set[str]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    rows = [row for row in content.get("attacks", []) if row["attack"] in kept and "unlearned" in row]
    runs = [*content.get("curves", []), *content.get("outcomes", [])]
    return tuple(rows), tuple(run for run in runs if run["attack"] in kept)


def _check_audit(content: Mapping[str, Any]) -> None:
    only(str, content["verdict"]["label"], content["verdict"]["sentence"])
    only(dict, content["provenance"], content["provenance"].get("weights_sha256") or {})
    check_attacks(content.get("relearning") or {})


def _certificate(path: Path, argument: str, weights: str, left_out: list[str]) -> bytes | None:
    if not path.is_file():
        return None
    content = read_result(path, argument, lambda found: only(str, found["weights_sha256"]["unlearned"]))
    reasons = {
        "it is of other weights": content["weights_sha256"]["unlearned"] != weights,
        "it holds ids as they are; certify again without --show_ids": "ids" in (content.get("forget") or {}),
        "it holds a path of this machine, of an attack's options": holds_path(content),
    }
    if why := next((reason for reason, applies in reasons.items() if applies), None):
        left_out.append(f"{path.name}: {why}")
        return None
    return path.read_bytes()


def holds_path(content: Any) -> bool:
    """Whether any text in JSON values is a place on a machine (:func:`is_place`).

    Example:
        >>> holds_path({"path": ["~/questions.csv"]}), holds_path({"model": "org/name"})
        (True, False)
    """
    if isinstance(content, Mapping):
        return any(map(holds_path, content.values()))
    if isinstance(content, list):
        return any(map(holds_path, content))
    return is_place(content)


def is_place(value: Any) -> bool:
    """Whether a value is an absolute path of two names or more, or one from a home directory.

    One name may be a token, such as ``/think``.

    Example:
        >>> is_place("/data/model"), is_place("C:/data/model"), is_place("/think"), is_place(1)
        (True, True, False, False)
    """
    if not isinstance(value, str):
        return False
    paths = (PurePosixPath(value), PureWindowsPath(value))
    return value.startswith("~/") or any(path.is_absolute() and len(path.parts) > 2 for path in paths)
