"""Do runs that differ in their seed flag the same neurons?

    python benchmarks/flag_overlap.py runs/seed0 runs/seed1 runs/seed2

Reads each run's spurious_neurons.csv and its model's shapes, and prints one JSON line.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import torch

from lightning_ssiuu.attribution.influence import SpuriousNeuron
from lightning_ssiuu.models.architectures import NeuronSite, neuron_sites
from lightning_ssiuu.models.meta import blueprint
from lightning_ssiuu.utils.errors import UserError


@dataclass(frozen=True)
class Overlap:
    """Mean over pairs of runs: Jaccard overlap of their flagged neurons, and what chance alone would give."""

    jaccard: float
    chance: float
    n_pairs: int


def flag_overlap(flagged: Sequence[Collection[SpuriousNeuron]], sites: Sequence[NeuronSite]) -> Overlap:
    """Do runs that differ in their seed flag the same neurons?

    Jaccard: flagged in both over flagged in either. Chance: the same ratio for the *expected* numbers, had each run
    drawn as many neurons at random from each site as it flagged there; runs that merely prefer the same layer or kind
    of module do not count as agreeing.

    Args:
        flagged: The flagged neurons of two runs or more.
        sites: Of the model.

    Raises:
        UserError: If there are fewer than two runs.

    Returns:
        Shares in [0, 1]; a pair without any flag counts 0.
    """
    if len(flagged) < 2:
        raise UserError("flagged", len(flagged), "the flags of two runs or more")
    widths = {site.key: site.width for site in sites}
    sets = [{(neuron.layer, neuron.module, neuron.index) for neuron in run} for run in flagged]
    jaccard, chance = [], []
    for one, other in combinations(sets, 2):
        counts = [Counter((layer, module) for layer, module, _ in run) for run in (one, other)]
        expected = sum(number * counts[1][key] / widths[key] for key, number in counts[0].items())
        total = len(one) + len(other)
        jaccard.append(len(one & other) / max(len(one | other), 1))
        chance.append(expected / (total - expected) if total else 0.0)
    return Overlap(sum(jaccard) / len(jaccard), sum(chance) / len(chance), len(jaccard))


def flagged_in(run: Path) -> list[SpuriousNeuron]:
    """The flagged neurons of a run, without their figures."""
    with (run / "spurious_neurons.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [SpuriousNeuron(row["module"], int(row["layer"]), int(row["index"]), *[0.0] * 5) for row in rows]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    runs = parser.parse_args(argv).runs
    sites = neuron_sites(blueprint(str(runs[0] / "model"), torch.float32, None))
    print(json.dumps(asdict(flag_overlap([flagged_in(run) for run in runs], sites))))


if __name__ == "__main__":
    main()
