"""Unlearn with several recipes and seeds, attack each result beside the oracle, print one row per recipe.

Every run stops at the same forgetting, a forget probability of at most 10 %: methods are comparable at equal forgetting
and equal retention only.

    python -m lightning_ssiuu.datamodules.embedded.build --without-forget --output runs/oracle
    python benchmarks/compare_objectives.py --oracle runs/oracle/tiny [--only NAME ...] [--seeds 0 1 2] [--output DIR]

Figures are the answers' probability in percent, mean ± standard deviation over training seeds. ``unlearned p`` and
``oracle p`` are the highest forget probability under a harmful attack on a fraction p, scored on the disjoint remainder
(maximum over learning rates and epochs, mean over attack seeds).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from lightning_ssiuu.__main__ import main as lightning_ssiuu

RECIPES = Path(__file__).parent.parent / "recipes"
OPTIMIZERS = RECIPES / "optimizer"
WEIGHT = "--model.init_args.regularizer.init_args.weight"
VARIANTS = {
    "GradientDifference": ("gradient_difference", []),
    "SSIUU, relative 0.1": ("ssiuu", [WEIGHT, "0.1"]),
    "SSIUU, relative 1": ("ssiuu", [WEIGHT, "1.0"]),
    "SSIUU, relative 3, anchor original": (
        "ssiuu",
        [WEIGHT, "3.0", "--model.init_args.regularizer.init_args.anchor", "original"],
    ),
    "SSIUU on neurons, relative 1, anchor original": (
        "ssiuu",
        ["--config", str(RECIPES / "regularizer" / "neuron.yaml")],
    ),
    "CIR": ("cir", []),
    "SAM": ("sam", []),
    "MUDMAN": ("mudman", []),
    "AdversarialUnlearning": ("adversarial_unlearning", []),
    "RepSelect": ("repselect", []),
    "MCU": ("mcu", []),
    "LAT": ("lat", []),
    "GRU": ("gru", []),
    "AltPO": ("altpo", []),
    "FLAT": ("flat", []),
    "TaskVector": ("task_vector", []),
    "GradientDifference, sgd": ("gradient_difference", ["--config", f"{OPTIMIZERS}/sgd.yaml"]),
    "GradientDifference, signsgd": ("gradient_difference", ["--config", f"{OPTIMIZERS}/signsgd.yaml"]),
    "GradientDifference, muon": ("gradient_difference", ["--config", f"{OPTIMIZERS}/muon.yaml"]),
}


def run(command: list[str]) -> None:
    """Run a command of the package; a failure ends the benchmark."""
    if status := lightning_ssiuu(command):
        raise SystemExit(status)


def one(recipe: str, options: list[str], seed: int, oracle: str | None, folder: Path) -> dict[str, float]:
    """Unlearn and attack once; reuses a finished run."""
    if not (folder / "attack.json").is_file():
        where = ["--trainer.default_root_dir", str(folder), "--overwrite"]
        seeds = ["--seed_everything", str(seed), "--data.init_args.seed", str(seed)]
        stop = ["--stopping.score", "probability", "--stopping.threshold", "10"]
        run(["fit", "--config", str(RECIPES / "objective" / f"{recipe}.yaml"), *options, *stop, *where, *seeds])
        attack = ["attack", "--config", str(RECIPES / "attack" / "harmful.yaml"), "--score", "probability"]
        run([*attack, "--model", str(folder / "model"), *(["--oracle", oracle] if oracle else [])])
    metrics = json.loads((folder / "metrics.json").read_text())
    attacks = [row for row in json.loads((folder / "attack.json").read_text())["attacks"] if row["attack"] == "harmful"]
    after = metrics["after"]
    row = {"steps": metrics["steps"], "d_plus": after["influence"]["d_plus_total"]}
    row["d_minus"] = after["influence"]["d_minus_total"]
    row |= {split: after["scores"][split]["probability"] for split in ("forget", "retain", "test")}
    for attack_row in attacks:
        for name in ("unlearned", "oracle") if "oracle" in attack_row else ("unlearned",):
            row[f"{name} {attack_row['p']}"] = attack_row[name]["forget_score"]["mean"]
    return row


def main() -> None:
    """Run everything and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracle", help="its figures are the same for every recipe: once is enough")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/comparison"))
    options = parser.parse_args()
    lines = []
    for name in options.only:
        recipe, extra = VARIANTS[name]
        folder = options.output / name.replace(" ", "_").replace(",", "")
        rows = [one(recipe, extra, seed, options.oracle, folder / str(seed)) for seed in options.seeds]
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        cells = [f"{mean(v):.3g} ± {stdev(v) if len(v) > 1 else 0:.2g}" for v in columns.values()]
        lines.append((["recipe", *columns], [name, *cells]))
    header = lines[0][0]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for _, cells in lines:
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
