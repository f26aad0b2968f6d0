"""Finished runs as ``compare`` reads them, written by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import yaml


def spread(mean: float, std: float = 0.0, n: int = 3) -> dict[str, Any]:
    return {"mean": mean, "std": std, "per_seed": [mean] * n}


def attacked(
    p: float | None, highest: float, oracle: float | None = None, inside: bool = True, attack: str = "harmful"
) -> dict[str, Any]:
    """A row of ``attack.json``, with a spread of 1 (the oracle 0.5, the gap 2) over the attack's seeds."""
    row: dict[str, Any] = {"attack": attack, "kind": attack.partition("_")[0], "p": p, "variant": None}
    row |= {"score": "probability", "n_attack": 4, "n_scored": 32}
    row["unlearned"] = {"before": spread(9.0), "forget_score": spread(highest, 1.0), "inside_grid": inside}
    if oracle is not None:
        row["oracle"] = {"before": spread(1.0), "forget_score": spread(oracle, 0.5), "inside_grid": True}
        row["gap"] = spread(highest - oracle, 2.0)
    return row


def curves(p: float | None, rate: float, *scores: list[float], model: str = "unlearned") -> list[dict[str, Any]]:
    named = {"attack": "harmful", "kind": "harmful", "model": model, "p": p, "learning_rate": rate}
    return [
        {**named, "seed": seed, "epochs": list(range(len(one))), "forget_scores": one}
        for seed, one in enumerate(scores)
    ]


def write_run(
    folder: Path,
    scores: tuple[float, float, float] = (10.0, 70.0, 95.0),
    seed: int = 0,
    objective: str = "SSIUU",
    attacks: list[dict[str, Any]] | None = None,
    drawn: list[dict[str, Any]] | None = None,
    utility: float | None = None,
    steps: int = 20,
    data: str | None = "d",
    score: str = "probability",
    train_on: str = "pairs",
    date: str | None = None,
    **options: Any,
) -> Path:
    """A run directory as ``fit`` leaves it, with scores on the forget, test and retain set."""
    folder.mkdir(parents=True)

    def block(values: tuple[float, float, float]) -> dict[str, Any]:
        splits = dict(zip(("forget", "test", "retain"), values, strict=True))
        return {f"{name}_score": value for name, value in splits.items()} | {
            "scores": {name: {score: value, "all_tokens": value / 2} for name, value in splits.items()},
            "influence": {},
        }

    metrics = {"objective": objective, "steps": steps, "stopped_by": "steps", "score": score}
    metrics |= {"before": block((90.0, 91.0, 92.0)), "after": block(scores)}
    metrics["provenance"] = {"seed": seed, "data_sha256": data}
    write_json(folder / "metrics.json", metrics)
    model = {"class_path": f"lightning_ssiuu.{objective}", "init_args": {"checkpoint": "tiny", **options}}
    config = {
        "seed_everything": seed,
        "trainer": {"default_root_dir": str(folder), "logger": {"save_dir": f"{folder}/logs"}},
        "model": model,
        "data": {"class_path": "lightning_ssiuu.Facts", "init_args": {"seed": seed, "train_on": train_on}},
    }
    if date is not None:
        config["data"]["init_args"]["date"] = date
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    if attacks is not None:
        content = {"attacks": attacks, "curves": drawn or [], "outcomes": [], "settings": {}}
        write_json(folder / "attack.json", content)
    if utility is not None:
        write_json(folder / "utility.json", {"utility_score": utility, "tasks": {}, "suite": "embedded"})
    return folder


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def edit(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)


OUTPUTS = {"compare.html", "compare.csv", "compare.md", "compare.tex", "plots/recovery_curves.pdf", "plots/pareto.pdf"}


TABLES = ("compare.csv", "compare.md", "compare.tex")


def table(output: Path) -> dict[str, dict[str, str]]:
    with (output / "compare.csv").open(encoding="utf-8", newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def broken(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path.parent
