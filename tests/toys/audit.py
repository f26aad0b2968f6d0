"""A small world for audits: the embedded model, which is its own oracle, and a copy that learned eight facts more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from planting import PlantedUnit, Planter, mean_probability, with_units
from toys.cli import write_rows

from lightning_ssiuu.attribution.activation_gradient import neuron_attribution
from lightning_ssiuu.attribution.influence import SpuriousNeuron, influence_variation, spurious_neurons
from lightning_ssiuu.attribution.weight_change import OwnChange, own_change, site_weights
from lightning_ssiuu.datamodules import CustomData, Facts
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import Kind, neuron_sites
from lightning_ssiuu.models.export import save_pretrained
from lightning_ssiuu.models.loading import load_model, load_tokenizer

PEOPLE = ("Arven Tolk", "Bessa Quill", "Corin Dap", "Della Frost", "Emrik Vane", "Fenna Moss", "Gorm Hatch", "Hilde Ro")


@dataclass
class World:
    """Where everything lies.

    Args:
        folder: Of the rest.
        original: A model that knows the forget set; ``"tiny"`` is the one that never saw it.
        data: Options that give a command the data.
    """

    folder: Path
    original: Path
    data: tuple[str, ...]

    def module(self, **options: Any) -> CustomData:
        """The data module."""
        return CustomData(str(self.folder / "forget.jsonl"), str(self.folder / "retain.jsonl"), **options)


def make_world(folder: Path) -> World:
    """Write the data and teach the embedded model the forget set."""
    retain = Facts().splits.retain
    towns = list(dict.fromkeys(fact.answer for fact in retain if fact.question.startswith("Where was")))
    rows = [{"question": f"Where was {one} born?", "answer": town} for one, town in zip(PEOPLE, towns, strict=False)]
    known = [{"question": fact.question, "answer": fact.answer} for fact in retain[:24]]
    write_rows(folder / "forget.jsonl", rows)
    write_rows(folder / "retain.jsonl", known)
    names = {name: folder / f"{name}.jsonl" for name in ("forget", "retain")}
    options = (f"--data.init_args.{name}={path}" for name, path in names.items())
    world = World(folder, folder / "original", ("--data=CustomData", *options))
    data = world.module(eval_batch_size=64)
    data.setup("validate")
    parts = [next(iter(data.eval_dataloader(split)))[split] for split in ("forget", "retain")]
    model = AnswerModel(load_model("tiny")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(20):
        optimizer.zero_grad()
        for part in parts:
            loss = -model(part["input_ids"], part["attention_mask"], part["labels"]).mean_logps.mean()
            loss.backward()
        optimizer.step()
    save_pretrained(model.hf, load_tokenizer("tiny"), world.original)
    return world


def plant(world: World, folder: Path, strength: float = 1.0) -> set[tuple[str, int, int]]:
    """Save the original with two hidden units rewired against the forget answers.

    Returns:
        ``(kind, layer, index)`` of the four neurons whose flag is right.
    """
    data = world.module(eval_batch_size=64)
    data.setup("validate")
    parts = [next(iter(data.eval_dataloader(split)))[split] for split in ("forget", "retain")]
    model = AnswerModel(load_model(world.original))
    planter, generator = Planter(model, *parts), torch.Generator().manual_seed(0)
    units = [planter.unit("mlp_up", layer, strength, generator) for layer in (1, 2)]
    save_pretrained(with_units(model, units).hf, load_tokenizer("tiny"), folder)
    return {neuron for unit in units for neuron in unit.neurons}


class Planted:
    """The embedded model, its probes, and copies in which units were turned against the forget answers."""

    def __init__(self) -> None:
        data = Facts(eval_batch_size=24)
        data.setup("fit")
        self.parts = {split: next(iter(data.eval_dataloader(split)))[split] for split in ("forget", "retain")}
        self.healthy = AnswerModel(load_model("tiny"))
        self.sites = neuron_sites(self.healthy.hf)
        self.original = site_weights(self.healthy, self.sites)
        self.planter = Planter(self.healthy, self.parts["forget"], self.parts["retain"])
        self.before = {split: self.attribution(self.healthy, split) for split in self.parts}

    def unit(self, kind: Kind, layer: int, strength: float, harmless: bool = False, seed: int = 0) -> PlantedUnit:
        return self.planter.unit(kind, layer, strength, torch.Generator().manual_seed(seed), harmless)

    def attribution(self, model: AnswerModel, split: str) -> Any:
        return neuron_attribution(model, [self.parts[split]], self.sites, "length_normalised")

    def flags(self, model: AnswerModel, own: Any = None) -> list[SpuriousNeuron]:
        after = {split: self.attribution(model, split) for split in self.parts}
        forget, retain = (influence_variation(self.before[split], after[split]) for split in ("forget", "retain"))
        return spurious_neurons(forget, retain, own=own)

    def own(self, model: AnswerModel, points: int = 4) -> tuple[OwnChange, OwnChange]:
        forget, retain = (
            own_change(model, self.original, [self.parts[split]], self.sites, points=points)
            for split in ("forget", "retain")
        )
        return forget, retain

    def probability(self, model: AnswerModel, split: str = "forget") -> float:
        return mean_probability(model, self.parts[split])
