"""The files of a run directory: what they are called and what must be in them. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_ssiuu.utils.files import check_name
from lightning_ssiuu.utils.reading import only, read_json, read_yaml, reading

#: What commands write into a run directory, beside folders whose names are options.
_RESULTS = (
    *("config.yaml", "metrics.json", "spurious_neurons.csv", "influence.csv", "plots", "lightning_logs", "compare"),
    *("attack.json", "audit.json", "audit_spurious_neurons.csv", "report.html", "utility.json", "privacy.json"),
    *("evaluate.json", "TOFU_EVAL.json"),
    *("certificate.json", "certificate.html", "certificate.key", "erase.json", "trials", "trials.csv", "log.txt"),
    *("leaderboard", "meta_evaluation.json"),
)
#: Attacks of the package in the order of tables; of those that fine-tune there are ones with adapters, too (``_lora``).
ATTACKS = (
    *("harmful", "held_out_facts", "benign", "quantization", "sampling", "paraphrase", "jailbreak", "prefill"),
    *(
        "few_shot",
        "translation",
        "multi_turn",
        "soft_prompt",
        "suffix_search",
        "embedding_attack",
        "ablation",
        "interpolation",
    ),
    *("unlearning_depth", "layer_probes"),
)
_CONFIG, _CONFIGURATION = "config.yaml", "valid YAML, as fit writes it"
_SECTIONS = ("model", "data", "trainer", "stopping", "saving")
_ATTACKS = re.compile(r"attack(ed_|\.).*", re.IGNORECASE)  # models and unfinished sweeps


def check_folder(argument: str, name: str, taken: Iterable[str] = ()) -> None:
    """Refuse a folder's name that is no plain one, or that a result or one of ``taken`` has in a run directory."""
    check_name(argument, name, [*_RESULTS, *taken, *([name] if _ATTACKS.fullmatch(name) else [])])


def attack_order(name: str) -> tuple[int, str]:
    """Where an attack stands in tables: in the order of :data:`ATTACKS`, others after them by name.

    >>> sorted(["mine", "benign", "harmful_lora", "harmful"], key=attack_order)
    ['harmful', 'harmful_lora', 'benign', 'mine']
    """
    kind = name.removesuffix("_lora")
    return (ATTACKS.index(kind) if kind in ATTACKS else len(ATTACKS)), name


def read_result(path: Path, argument: str, check: Callable[[Any], object]) -> dict[str, Any]:
    """Content of a JSON file in a run directory; a UserError unless it is of this version."""
    return read_json(path, argument, allowed=f"the {path.name} that this version writes", check=check)


def check_metrics(content: Mapping[str, Any]) -> None:
    """Raise something unless ``content`` has what commands ask of a ``metrics.json``."""
    only(str, content["objective"], content["score"])
    for moment in ("before", "after"):
        only(dict, *content[moment]["scores"].values())
        only(dict, content[moment].get("influence") or {})
    only(dict, content.get("provenance") or {})


def read_config(run: Path, argument: str) -> dict[str, Any]:
    """The ``config.yaml`` of a run; a UserError unless it is a mapping."""
    return read_yaml(run / _CONFIG, argument, _CONFIGURATION)


def read_sections(run: Path, argument: str) -> dict[str, Any]:
    """The sections that ``fit`` writes into a run's ``config.yaml``; a UserError unless each is a mapping."""
    content = read_config(run, argument)
    sections = {name: content.get(name) or {} for name in _SECTIONS}
    with reading(argument, str(run / _CONFIG), _CONFIGURATION, quote=False):
        only(dict, *sections.values())
        only(dict, *(section.get("init_args") or {} for section in sections.values()))
    return content | sections


def check_attacks(content: Mapping[str, Any]) -> None:
    """Raise something unless ``content`` is that of an ``attack.json``, of earlier versions too."""
    only(list, content.get("attacks", []), content.get("curves", []), content.get("outcomes", []))
    for row in content.get("attacks", []):
        only(str, row["attack"], row["score"])
        only((int, float), row["p"] or 0.0)
        only(str, row["variant"] or "")
        spreads = [row[name]["forget_score"] for name in ("unlearned", "oracle") if name in row]
        spreads += [row.get("gap") or {}, (row.get("control") or {}).get("forget_score") or {}]
        only(dict, *spreads)
        only(list, *(spread.get("per_seed") or [] for spread in spreads))
    for curve in content.get("curves", []):
        only(str, curve["attack"], curve["model"])
        only((int, float), curve["p"] or 0.0, curve["learning_rate"], *curve["epochs"])
        if len(curve["epochs"]) != len(curve["forget_scores"]):
            raise ValueError("a curve whose epochs and scores differ in number")
        only(dict, curve.get("attacker", {}), curve.get("utility", {}))
        described(curve.get("attacker", {}))
        only(list, *curve.get("utility", {}).values())
    for settings in (content.get("settings") or {}).values():
        only(dict, settings, settings.get("provenance") or {})
        only(dict, (settings.get("provenance") or {}).get("weights_sha256") or {})


def described(attacker: Mapping[str, Any]) -> str:
    """What a curve of ``attack.json`` says of its attacker, in words; empty for AdamW on all weights.

    >>> described({"optimizer": "sgd", "repair_epochs": 2})
    'sgd, repair epochs 2'
    """
    shown = {name: value for name, value in attacker.items() if name != "optimizer"}
    if "lora" in shown:
        shown["lora"] = (
            f"({', '.join(f'{name} {value}' for name, value in shown['lora'].items() if value is not None)})"
        )
    words = [f"{name.replace('_', ' ')} {value}" for name, value in shown.items()]
    return ", ".join(([str(attacker["optimizer"])] if "optimizer" in attacker else []) + words)


def found_by(best: Mapping[str, Any]) -> str:
    """Who found the highest score of an attack, in words, of the ``best`` of a row of ``attack.json``.

    >>> found_by({"learning_rate": 1e-3, "epoch": 4})
    'adamw, lr 0.001, epoch 4'
    """
    attacker = described(best.get("attacker", {})) or "adamw"
    return f"{attacker}, lr {best['learning_rate']:g}, epoch {best['epoch']}"
