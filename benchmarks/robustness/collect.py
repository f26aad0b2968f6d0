"""The figures of finished runs, read from what their stages wrote: one record a run, as ``results.json`` has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from lightning_ssiuu.attacks.curves import spread
from lightning_ssiuu.utils.files import write_json

from .plan import Run
from .stages import Stage, Store
from .table import Setting

#: Parts of ``metrics.json`` and ``audit.json`` that say what an attack found, what was before, or how they were made.
_NOT_INDICATORS = ("before", "scores", "relearning", "provenance", "alpha", "flagged", "verdict", "retain_chance")


def record(run: Run, store: Store, score: str) -> dict[str, Any] | None:
    """A run's figures in percent; None as long as its fit has not finished. What is missing yet is left out."""
    fit = run.stages["fit"]
    if not store.is_finished(fit):
        return None
    metrics, stage = store.read(fit, "metrics.json"), store.record(fit)
    assert metrics is not None
    assert stage is not None
    before, after = ({s: v[score] for s, v in metrics[when]["scores"].items()} for when in ("before", "after"))
    stages = [stage]
    if (first := run.stages.get("before")) is not None:
        taught, cost = store.read(first, "metrics.json"), store.record(first)
        assert taught is not None
        assert cost is not None
        stages.append(cost)
        # What is kept is kept of the learned model; its forget set may have been another one.
        before |= {split: v[score] for split, v in taught["before"]["scores"].items() if split != "forget"}
    content: dict[str, Any] = {
        **{"phase": run.phase, "data": run.data, "objective": run.objective, "label": run.label, "seed": run.seed},
        **{"setting": {"name": run.setting.name, "options": dict(run.setting.options)}, "retain_weight": run.retain},
        **{"steps": metrics["steps"], "stopped_by": metrics["stopped_by"], "collapsed": metrics.get("collapsed")},
        "reached": reached(run, store),
        "matched": store.read(fit, "matched.json"),
        "before": before,
        "after": after,
        # A fit that was taken up after a kill did a part of its work twice, or in a process nobody counted.
        "cpu_seconds": sum(each["cpu_seconds"] for each in stages) if all(s["attempts"] == 1 for s in stages) else None,
        "attacks": _attacks(run, store),
        "commands": {name: store.command(each) for name, each in _named(run).items()},
    }
    oracle = run.stages.get("oracle")
    if oracle is not None and store.is_finished(oracle):
        content["oracle"] = scores_after(store, oracle, score)
    if (audit := run.stages.get("audit")) is not None and (found := store.read(audit, "audit.json")) is not None:
        content["verdict"] = found["verdict"]["label"]
        content["indicators"] = indicators(metrics, found)
    return content


def reached(run: Run, store: Store) -> bool:
    """Whether a finished fit ended at the forget score, or has a rule of its own: others are compared with nothing."""
    metrics = store.read(run.stages["fit"], "metrics.json")
    assert metrics is not None
    return not run.matched or metrics["stopped_by"] not in ("steps", "epochs")


def scores_after(store: Store, stage: Stage, score: str) -> dict[str, float]:
    """A score a split, of a model that a stage trained."""
    metrics = store.read(stage, "metrics.json")
    assert metrics is not None
    return {split: values[score] for split, values in metrics["after"]["scores"].items()}


def _named(run: Run) -> dict[str, Stage]:
    attacks = {f"attack {name}": stage for name, stage in run.attacks.items()}
    return dict(run.stages) | attacks | {f"oracle's attack {name}": s for name, s in run.oracle_attacks.items()}


def _attacks(run: Run, store: Store) -> list[dict[str, Any]]:
    rows = []
    for name, stage in run.attacks.items():
        if not store.is_finished(stage):
            continue
        oracle = run.oracle_attacks.get(name)
        if oracle is not None and not store.is_finished(oracle):
            continue
        for row in joined(store, stage, oracle)["attacks"]:
            relearned = "inside_grid" in row["unlearned"]  # the control of others is something else: random neurons
            reference_is = next((each for each in ("oracle", "control")[: 1 + relearned] if each in row), None)
            title = f"{name} {row['variant']}" if row["variant"] else name
            found: dict[str, Any] = {"attack": title, "p": row["p"], "inside_grid": row["unlearned"].get("inside_grid")}
            found |= {
                key: row["unlearned"][of]["per_seed"] for key, of in (("before", "before"), ("highest", "forget_score"))
            }
            if "utility" in row["unlearned"]:
                found["utility"] = row["unlearned"]["utility"]
            if reference_is is not None:
                reference = row[reference_is]["forget_score"]["per_seed"]
                found |= {"reference": reference, "reference_is": reference_is}
            rows.append(found)
    return rows


def joined(store: Store, attack: Stage, oracle: Stage | None) -> dict[str, Any]:
    """An ``attack.json`` with the oracle's figures in it, as ``attack --oracle`` writes it: it is attacked but once."""
    content = store.read(attack, "attack.json")
    assert content is not None
    if oracle is None:
        return content
    other = store.read(oracle, "attack.json")
    assert other is not None
    for row, of_oracle in zip(content["attacks"], other["attacks"], strict=True):
        row["oracle"] = of_oracle["unlearned"]
        pairs = zip(*(row[name]["forget_score"]["per_seed"] for name in ("unlearned", "oracle")), strict=True)
        row["gap"] = spread([ours - theirs for ours, theirs in pairs])
    content["curves"] += [curve | {"model": "oracle"} for curve in other["curves"]]
    return content


def put_attacks_beside_fit(run: Run, store: Store) -> None:
    """What the audit of a run judges by: all attacks on it in one ``attack.json``, beside its model."""
    merged: dict[str, Any] = {"attacks": [], "curves": [], "outcomes": [], "settings": {}}
    for name, stage in run.attacks.items():
        content = joined(store, stage, run.oracle_attacks.get(name))
        for key in ("attacks", "curves", "outcomes"):
            merged[key] += content[key]
        merged["settings"] |= content["settings"]
    write_json(store.folder(run.stages["fit"]) / "attack.json", merged)


def indicators(metrics: Mapping[str, Any], audit: Mapping[str, Any]) -> dict[str, float]:
    """Every figure of a run that an attack has no part in, by its dotted name: what could predict recovery.

    Those of the oracle and of the model before unlearning are the same for all objectives, and left out.
    """
    found = numbers({name: part for name, part in metrics.items() if name not in _NOT_INDICATORS}, "fit.")
    for name, part in audit.items():
        if name not in _NOT_INDICATORS and isinstance(part, Mapping):
            found |= numbers(part.get("unlearned", part if name in ("ablation", "indicators") else {}), f"{name}.")
    return found


def numbers(content: Any, prefix: str = "") -> dict[str, float]:
    """The numbers in nested dictionaries; lists, texts and truth values are left out."""
    if isinstance(content, Mapping):
        return {key: n for name, part in content.items() for key, n in numbers(part, f"{prefix}{name}.").items()}
    if isinstance(content, bool) or not isinstance(content, (int, float)):
        return {}
    return {prefix.removesuffix("."): float(content)}


def recovery(record: Mapping[str, Any]) -> float | None:
    """Highest forget score, the mean over attacks, fractions and the attack's seeds; None before it was attacked."""
    values = [mean(row["highest"]) for row in record["attacks"]]
    return mean(values) if values else None


def retained(record: Mapping[str, Any], split: str = "retain") -> float | None:
    """Percent of the score before unlearning; None where it was 0 or the split is not there."""
    before = record["before"].get(split)
    return 100 * record["after"][split] / before if before else None


def choose(records: Sequence[Mapping[str, Any]], least_retained: float) -> dict[str, Any] | None:
    """The setting of one objective to go on with, out of its runs on the tune data; None if none can be taken.

    Of those that reached the level in every run and kept ``least_retained`` percent of the retain score, the one that
    recovers least under attack; if none kept so much, the one that kept most.
    """
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for each in records:
        by_name.setdefault(each["setting"]["name"], []).append(each)
    found = []
    for name, runs in by_name.items():
        if all(run["reached"] and recovery(run) is not None for run in runs):
            share = mean(retained(run) or 0.0 for run in runs)
            found.append({"name": name, "retained": share, "recovery": mean(recovery(run) or 0.0 for run in runs)})
    if not found:
        return None
    kept = [each for each in found if each["retained"] >= least_retained]
    best = min(kept, key=lambda each: each["recovery"]) if kept else max(found, key=lambda each: each["retained"])
    return {**best, "kept_enough": bool(kept), "tried": found}


def setting_of(name: str, settings: Sequence[Setting]) -> Setting:
    """A setting by its name."""
    return next(setting for setting in settings if setting.name == name)
