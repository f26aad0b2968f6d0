"""What a certificate says: gathered from a run's directory, nothing is measured anew."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning_ssiuu.attacks.records import read_attacks
from lightning_ssiuu.datamodules.deletion import read_key
from lightning_ssiuu.evaluation.results import ATTACKS, check_metrics, described, read_result
from lightning_ssiuu.reports.audit.verdict import THRESHOLD
from lightning_ssiuu.utils.errors import UserError

SCHEMA = "lightning-ssiuu certificate 1"
FILE, KEY = "certificate.json", "certificate.key"
#: Decimals of percentages. A mean to its last digit is a fingerprint: whoever has the model can try which rows give it.
_PERCENT, _SHARE = 1, 3


def keyed(key: bytes, kind: str, text: str | bytes) -> str:
    """HMAC-SHA256 in hexadecimal digits; without the key nobody can try out what was hashed."""
    given = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    return hmac.digest(key, kind.encode() + b"\0" + given, "sha256").hex()


def key_of(folder: Path) -> bytes:
    """The secret key beside a certificate; made, for its owner alone to read, where there is none.

    Raises:
        UserError: If what is there is no secret.
    """
    path = folder / KEY
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(os.urandom(32).hex() + "\n")
    return read_key(str(path), "run")


def sealed(content: Mapping[str, Any], key: bytes) -> dict[str, Any]:
    """A certificate with its seal, a keyed hash of all the rest: who has the key can tell whether it was edited."""
    rest = json.loads(json.dumps({name: value for name, value in content.items() if name != "seal"}))
    return rest | {"seal": keyed(key, "certificate", json.dumps(rest, sort_keys=True))}


def certificate(
    folder: Path,
    names: Sequence[str],
    n_retain: int,
    sources: Iterable[Path],
    key: bytes,
    shown: bool = False,
    id_key: bytes | None = None,
) -> dict[str, Any]:
    """The contents of ``certificate.json``.

    Args:
        folder: A run's directory with ``metrics.json``, ``config.yaml``, ``attack.json`` and ``audit.json``.
        names: Ids of the forgotten rows, which the certificate has as keyed hashes.
        n_retain: Rows of the retain set.
        sources: Files that the forget set was read from; their keyed digests are kept.
        key: Of the hashes.
        shown: Also write the ids as they are.
        id_key: The key under which the data hashed its ids, itself kept as a keyed hash; None: they are not hashed.

    Raises:
        UserError: If a file is missing.
    """
    metrics, audit, attacks = records(folder)
    rows: dict[str, Any] = {
        "rows": len(names),
        "ids_hmac": sorted({keyed(key, "id", name) for name in names}),  # sorted: their order would tell of the table
        "id_key_hmac": None if id_key is None else keyed(key, "id_key", id_key),
        "files_hmac": sorted(keyed(key, "file", _sha256(path)) for path in sources),
    }
    if shown:
        rows["ids"] = sorted(set(names))
    tried = [_attack(row, attacks) for row in attacks["attacks"]] or _probe(audit)
    kinds = {row["attack"].removesuffix("_lora") for row in tried}
    weights = audit["provenance"]["weights_sha256"]
    content = {
        "schema": SCHEMA,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": metrics["provenance"]["versions"],
        "verdict": _rounded(audit["verdict"], _SHARE),
        "not_counted": _not_counted(attacks["attacks"], audit),
        "weights_sha256": {name: weights[name] for name in ("original", "unlearned", "oracle") if name in weights},
        # Keyed, as a condition or ids may stand in it.
        "configuration_hmac": keyed(key, "configuration", (folder / "config.yaml").read_bytes()),
        "forget": rows,
        "retain": {"rows": n_retain},
        "run": {
            "objective": metrics["objective"],
            "steps": metrics["steps"],
            "stopped_by": metrics["stopped_by"],
            "seed": metrics["provenance"].get("seed"),
        },
        "scores": {
            model: {split: _rounded(dict(sorted(scores.items())), _PERCENT) for split, scores in by_split.items()}
            for model, by_split in audit["scores"].items()
        },
        "scored": {"data_options": audit.get("data_options", {})},
        "tried": tried,
        "not_tried": [name for name in ATTACKS if name not in kinds],
        "settings": {
            name: {option: value for option, value in settings.items() if option != "provenance"}
            for name, settings in attacks["settings"].items()
        },
    }
    return sealed(content, key)


def records(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What fit, audit and attack left in a run's directory.

    Raises:
        UserError: If a file is missing, or not of this version.
    """
    for name in ("metrics.json", "config.yaml", "audit.json"):
        if not (folder / name).is_file():
            raise UserError("run", str(folder), f"a directory with {name}, which fit and audit write")
    metrics = read_result(folder / "metrics.json", "run", check_metrics)
    audit = read_result(folder / "audit.json", "run", lambda content: content["verdict"]["label"])
    if "weights_sha256" not in (audit.get("provenance") or {}):
        allowed = "a directory whose audit.json says which weights were audited: run audit again"
        raise UserError("run", str(folder), allowed)
    return metrics, audit, read_attacks(folder, "run")


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _rounded(content: Any, digits: int) -> Any:
    if isinstance(content, Mapping):
        return {name: _rounded(value, digits) for name, value in content.items()}
    if isinstance(content, list):
        return [_rounded(value, digits) for value in content]
    return round(content, digits) if isinstance(content, float) else content


def _not_counted(rows: Iterable[Mapping[str, Any]], audit: Mapping[str, Any]) -> list[str]:
    # A verdict rests on the relearning attacks of one score. What another attack brings back stands beside it, of each
    # the most; of a figure that is no score of the audit's, such as a depth, what lies above the oracle's.
    counted = [(row["attack"], row["p"], row["score"]) for row in (audit.get("relearning") or {}).get("attacks", [])]
    most: dict[tuple[str, str], tuple[float, str]] = {}
    for row in rows:
        attack, score, result = row["attack"], row["score"], row["unlearned"]
        before, highest = result["before"]["mean"], result["forget_score"]["mean"]
        original = audit["scores"]["original"]["forget"].get(score)
        changed = f"goes from {before:.1f} % to {highest:.1f} %"
        oracle = (row.get("oracle") or {}).get("forget_score")
        if original is None and oracle is not None:
            before, changed = oracle["mean"], f"is {highest:.1f} %, and of the oracle {oracle['mean']:.1f} %"
        back = highest - before
        known = (attack, row["p"], score) in counted or back <= THRESHOLD * ((original or 100.0) - before)
        if not known and back > most.get((attack, score), (0.0, ""))[0]:
            called = " ".join(filter(None, (attack.replace("_", " "), row["variant"])))
            named = f"The verdict does not count the {called} attack, under which the forget score"
            most[attack, score] = back, f"{named} ({score.replace('_', ' ')}) {changed}."
    return [text for _, text in most.values()]


def _attack(row: Mapping[str, Any], attacks: Mapping[str, Any]) -> dict[str, Any]:
    name, p = row["attack"], row["p"]
    told: dict[str, Any] = {"attack": name, "p": p, "variant": row["variant"], "score": row["score"]}
    curves = [curve for curve in attacks.get("curves", []) if (curve["attack"], curve["p"]) == (name, p)]
    if curves:  # what was tried in the end: an attack may have gone on with larger rates and more epochs
        told["learning_rates"] = sorted({curve["learning_rate"] for curve in curves}, reverse=True)
        told["epochs"] = max(curve["epochs"][-1] for curve in curves)
    if attackers := sorted({described(curve.get("attacker", {})) for curve in curves} - {""}):
        told["attackers"] = attackers
    kept = _models(row)
    if "unlearned" in kept and (own := [curve for curve in curves if curve["model"] == "unlearned"]):
        kept["unlearned"]["by_seed"] = _by_seed(own)
    return told | kept | {"gap": _rounded(row.get("gap"), _PERCENT)}


def _models(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {
            "before": _rounded(row[name]["before"]["mean"], _PERCENT),
            "highest": _rounded(row[name]["forget_score"], _PERCENT),
            "inside_grid": row[name].get("inside_grid"),
        }
        for name in ("unlearned", "oracle", "control")
        if "before" in (row.get(name) or {})
    }


def _by_seed(curves: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    # Which run found the highest score of each seed, in the order of `per_seed`: one that can be repeated by itself.
    found = []
    for seed in sorted({curve["seed"] for curve in curves}):
        own = sorted((curve for curve in curves if curve["seed"] == seed), key=lambda curve: curve["learning_rate"])
        top = max(own, key=lambda curve: max(curve["forget_scores"]))
        run = {"seed": seed, "learning_rate": top["learning_rate"], "epochs": top["epochs"][-1]}
        found.append(run | ({"attacker": top["attacker"]} if top.get("attacker") else {}))
    return found


def _probe(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    # The audit's own small attack, where the run was not attacked before.
    relearning = audit.get("relearning") or {}
    told = {name: relearning["options"][name] for name in ("learning_rates", "epochs") if "options" in relearning}
    return [
        {"attack": row["attack"], "p": row["p"], "variant": row.get("variant"), "score": row["score"]}
        | told
        | _models(row)
        | {"gap": _rounded(row.get("gap"), _PERCENT)}
        for row in relearning.get("attacks", [])
    ]
