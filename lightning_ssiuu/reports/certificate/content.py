"""What a certificate says: gathered from a run's directory, nothing is measured anew."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning_ssiuu.attacks.records import read_attacks
from lightning_ssiuu.evaluation.results import check_metrics, described, read_result
from lightning_ssiuu.utils.errors import UserError

SCHEMA = "lightning-ssiuu certificate 1"
FILE, KEY = "certificate.json", "certificate.key"
#: Attacks of the package, by the name of their rows in attack.json.
ATTACKS = ("harmful", "benign", "quantization", "ablation", "interpolation", "sampling", "paraphrase")


def keyed(key: bytes, kind: str, text: str | bytes) -> str:
    """HMAC-SHA256 in hexadecimal digits; without the key nobody can try out what was hashed."""
    given = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    return hmac.digest(key, kind.encode() + b"\0" + given, "sha256").hex()


def key_of(folder: Path) -> bytes:
    """The secret key beside a certificate; made, for its owner alone to read, where there is none."""
    path = folder / KEY
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(os.urandom(32).hex() + "\n")
    return path.read_bytes().strip()


def certificate(
    folder: Path,
    weights: Mapping[str, str],
    names: Sequence[str],
    n_retain: int,
    sources: Iterable[Path],
    key: bytes,
    shown: bool = False,
) -> dict[str, Any]:
    """The contents of ``certificate.json``.

    Args:
        folder: A run's directory with ``metrics.json``, ``config.yaml``, ``attack.json`` and ``audit.json``.
        weights: SHA-256 digests of the models' weights, by ``original``, ``unlearned`` and perhaps ``oracle``.
        names: Ids of the forgotten rows, which the certificate has as keyed hashes.
        n_retain: Rows of the retain set.
        sources: Files that the forget set was read from; their keyed digests are kept.
        key: Of the hashes.
        shown: Also write the ids as they are.

    Raises:
        UserError: If a file is missing.
    """
    for name in ("metrics.json", "config.yaml", "audit.json"):
        if not (folder / name).is_file():
            raise UserError("run", str(folder), f"a directory with {name}, which fit and audit write")
    metrics = read_result(folder / "metrics.json", "run", check_metrics)
    audit = read_result(folder / "audit.json", "run", lambda content: content["verdict"]["label"])
    attacks = read_attacks(folder, "run")
    rows: dict[str, Any] = {
        "rows": len(names),
        "ids_hmac": sorted({keyed(key, "id", name) for name in names}),  # sorted: their order would tell of the table
        "files_hmac": sorted(keyed(key, "file", path.read_bytes()) for path in sources),
    }
    if shown:
        rows["ids"] = sorted(set(names))
    tried = [_attack(row, attacks) for row in attacks["attacks"]] or _probe(audit)
    return {
        "schema": SCHEMA,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": metrics["provenance"]["versions"],
        "verdict": audit["verdict"],
        "weights_sha256": dict(weights),
        "configuration_sha256": hashlib.sha256((folder / "config.yaml").read_bytes()).hexdigest(),
        "forget": rows,
        "retain": {"rows": n_retain},
        "run": {
            "objective": metrics["objective"],
            "steps": metrics["steps"],
            "stopped_by": metrics["stopped_by"],
            "seed": metrics["provenance"].get("seed"),
        },
        "scores": {
            model: {split: dict(sorted(scores.items())) for split, scores in by_split.items()}
            for model, by_split in audit["scores"].items()
        },
        "tried": tried,
        "not_tried": [name for name in ATTACKS if not any(row["attack"].startswith(name) for row in tried)],
    }


def _attack(row: Mapping[str, Any], attacks: Mapping[str, Any]) -> dict[str, Any]:
    settings = attacks["settings"].get(row["attack"], {})
    told = {name: settings[name] for name in ("learning_rates", "epochs", "seeds", "batch_size") if name in settings}
    curves = [curve for curve in attacks.get("curves", []) if curve["attack"] == row["attack"]]
    if attackers := sorted({described(curve.get("attacker", {})) for curve in curves} - {""}):
        told["attackers"] = attackers
    kept = {name: _found(row[name]) for name in ("unlearned", "oracle", "control") if "before" in (row.get(name) or {})}
    return {"attack": row["attack"], "p": row["p"], "variant": row["variant"], **told, **kept, "gap": row.get("gap")}


def _found(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "before": result["before"]["mean"],
        "highest": result["forget_score"],
        "inside_grid": result.get("inside_grid"),
    }


def _probe(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    # The audit's own small attack, where the run was not attacked before.
    relearning = audit.get("relearning") or {}
    return [
        {"attack": row["attack"], "p": row["p"], "variant": row.get("variant")}
        | {name: _found(row[name]) for name in ("unlearned", "oracle", "control") if "before" in (row.get(name) or {})}
        | {"gap": row.get("gap")}
        for row in relearning.get("attacks", [])
    ]
