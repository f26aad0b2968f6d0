"""Compare losses, gradients, training and metrics with open-unlearning's on the same batches and weights.

    git clone https://github.com/locuslab/open-unlearning
    python benchmarks/peer_parity.py --peer open-unlearning [--only losses training metrics]

Random Llama models in float64, one of them the original. ``losses``: each method's whole loss (forget and retain,
default weights) and its gradient by all weights. ``training``: the weights after five steps (peer_trajectory.py).
``metrics``: every metric by the peer's own code (peer_metrics.py). Batches: ``equal``, answers of one length behind
prompts of several; ``unequal``, several of both; ``bare``, neither prompts nor padding. Where the two differ by design
the note says why, and another row is without that cause where it can be taken away; a difference anywhere else ends
the script with status 1. Nothing of the peer is imported but the files of its losses, metrics and collator, of its main
or of pull request 175.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peer_metrics
import peer_trajectory
import torch
from peer_code import imported
from peer_tables import TOLERANCE, Table, drawn, relative, toy
from torch import Tensor

from lightning_ssiuu.datamodules.pairs import batch_of
from lightning_ssiuu.models.answers import AnswerModel, Answers
from lightning_ssiuu.models.loading import load_tokenizer
from lightning_ssiuu.objectives import UnlearningModule, objectives
from lightning_ssiuu.objectives.rmu import hidden_mse
from lightning_ssiuu.training.reference import LiveReference

LENGTHS = {
    "equal": ([(9, 5), (4, 5), (6, 5)], [(3, 4), (8, 4)]),
    "unequal": ([(9, 2), (4, 7), (6, 3)], [(3, 6), (8, 2)]),
    "bare": ([(1, 5), (1, 5), (1, 5)], [(1, 4), (1, 4)]),
}
TOKENS = "a mean over all tokens of the batch there, over sequences here"
PROMPT = "prompt and padding count there"
EVERYWHERE = f"{PROMPT}, and the position after the answer"
LATER = "one position later there"
#: As the peer's means are.
TOKEN = {"reduction": "token"}


@dataclass(frozen=True)
class Case:
    """A method and a batch.

    Args:
        name: Of the peer's class, and of ours unless ``ours`` is given.
        batch: Key of ``LENGTHS``.
        note: What differs by design; empty where nothing may.
        ours: Our class.
        options: Of our class.
        peer: Attributes of the peer's object.
        shifted: Whether the peer is given forget labels at the positions that predict them.
        longer: Whether ours is given retain answers of one token more.
    """

    name: str
    batch: str
    note: str = ""
    ours: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    peer: Mapping[str, Any] = field(default_factory=dict)
    shifted: bool = False
    longer: bool = False


def cases() -> list[Case]:
    """All of them."""
    bound = {"primal_dual": False, "can_update": False, "retain_loss_eps": 0.0, "log": lambda *_: None}
    bound |= {"dual_update_upon": "step", "loss_names": ["forget_loss", "retain_loss"], "preferences": [1.0, 1.0]}
    # name, ours, options, the peer's attributes, what differs on unequal lengths
    methods: list[tuple[str, str, dict[str, Any], dict[str, Any], str]] = [
        ("GradAscent", "GradientAscent", {}, {}, TOKENS),
        ("GradDiff", "GradientDifference", {}, {}, TOKENS),
        ("NPO", "NPO", {}, {"beta": 0.1}, ""),
        ("NPO", "NPO", {"beta": 0.5}, {"beta": 0.5}, ""),
        ("SimNPO", "SimNPO", {}, {"beta": 4.5, "delta": 0.0, "gamma": 0.125}, ""),
        ("DPO", "DPO", {}, {"beta": 0.1}, ""),
        ("CEU", "CEU", {}, {"ignore_first_n_answer_tokens": 1}, TOKENS),
        ("WGA", "WGA", {}, {"beta": 1.0}, TOKENS),
        ("SatImp", "SatImp", {}, {"beta1": 5.0, "beta2": 1.0, "gamma": 0.1}, TOKENS),
    ]
    rows = []
    for name, ours, options, peer, note in methods:
        alone = options | {"retain_weight": 0.0}, peer | {"alpha": 0.0}
        rows += [Case(name, "equal", "", ours, options, peer), Case(name, "equal", "", ours, *alone)]
        rows += [Case(name, "unequal", note, ours, *alone)]
        rows += [Case(name, "unequal", "", ours, options | TOKEN, peer)]
    undial = {"beta": 10.0, "alpha": 0.0}
    kl: dict[str, Any] = {"forget_weight": 1.0, "retain": "kl"}
    return [
        *rows,
        Case("UNDIAL", "bare", peer=undial),
        Case("UNDIAL", "equal", PROMPT, peer=undial),
        Case("UNDIAL", "unequal", PROMPT, peer=undial),
        Case("PDU", "equal", peer=bound, shifted=True),
        Case("PDU", "equal", LATER, peer=bound),
        Case("PDU", "unequal", f"{LATER}; {TOKENS}", peer=bound),
        Case("PDU", "unequal", options=TOKEN, peer=bound, shifted=True),
        Case("GradDiff", "bare", "retain KL: the position after the answer counts there", "GradientDifference", kl),
        Case("GradDiff", "bare", "", "GradientDifference", kl, longer=True),
        Case("GradDiff", "equal", f"retain KL: {EVERYWHERE}", "GradientDifference", kl),
    ]


def part(lengths: list[tuple[int, int]], seed: int, model: AnswerModel) -> dict[str, Tensor]:
    """Random prompts and answers drawn from a model, of (prompt, answer) lengths, padded right."""
    return batch_of(drawn(lengths, seed, model), 1) | {"example_id": torch.arange(len(lengths))}


def longer(some: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part without padding, with one more token at the end of every answer."""
    width = {name: torch.cat([some[name], some[name][:, -1:]], 1) for name in ("input_ids", "attention_mask", "labels")}
    return {**some, **width}


def show(
    table: Table, names: list[str], mine: Tensor, other: Tensor, inputs: list[Tensor], note: str, aside: str = ""
) -> None:
    """Print a row of the table: the losses and their gradients by the inputs."""
    g, h = (torch.cat([x.flatten() for x in torch.autograd.grad(loss, inputs)]) for loss in (mine, other))
    values = mine.item(), other.item()
    table.row(names, values, (relative(mine.detach(), other.detach()), relative(g, h)), note, TOLERANCE, aside)


def ours(case: Case, model: AnswerModel, original: AnswerModel, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """Our loss, and the objective."""
    module: UnlearningModule = objectives()[case.ours or case.name](**case.options)
    module.adopt(model, load_tokenizer("tiny"))
    module._reference = LiveReference(original, module.references())
    loss = module.forget_weight * module.forget_loss(batch["forget"])
    if module.retain_weight > 0:
        retain = longer(batch["retain"]) if case.longer else batch["retain"]
        loss = loss + module.retain_weight * module.retain_loss(retain)
    return loss, module


def theirs(
    case: Case, class_named: Any, model: AnswerModel, original: AnswerModel, batch: Mapping[str, Any], module: Any
) -> Tensor:
    """The peer's loss."""
    peer_class = class_named(case.name)
    peer = peer_class.__new__(peer_class)  # its Trainer is not needed
    options = {"gamma": 1.0, "alpha": 1.0, "retain_loss_type": "KL" if case.options.get("retain") else "NLL"}
    vars(peer).update(options | dict(case.peer) | {"model": model.hf, "ref_model": original.hf})
    inputs = {name: {key: value for key, value in one.items() if key != "example_id"} for name, one in batch.items()}
    if case.name == "DPO":
        alternate = dict(module.rejected(batch["forget"]))
        del alternate["example_id"]
        inputs["forget"] = {"original": inputs["forget"], "alternate": alternate}
    if case.shifted:
        labels = inputs["forget"]["labels"]
        inputs["forget"]["labels"] = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    loss: Tensor = peer.compute_loss(model.hf, inputs)
    return loss


def activation_losses(class_named: Any, batch: str) -> tuple[Tensor, Tensor, Tensor]:
    """RMU's distance of activations to a target, ours and the peer's on the same positions, and the activations."""
    generator = torch.Generator().manual_seed(3)
    forget, _ = LENGTHS[batch]
    mask = torch.zeros(len(forget), max(map(sum, forget)), dtype=torch.bool)
    for row, (prompt, answer) in enumerate(forget):
        mask[row, prompt : prompt + answer] = True
    hidden = torch.randn(*mask.shape, 16, dtype=torch.float64, generator=generator).requires_grad_()
    target = torch.rand(16, dtype=torch.float64, generator=generator)
    index = mask.nonzero()[:, 0]
    answers = Answers(torch.zeros(len(index), 2, dtype=torch.float64), torch.zeros_like(index), index, len(forget))
    peer_class = class_named("RMU")
    other = peer_class.compute_activation_loss(peer_class.__new__(peer_class), hidden, target.expand_as(hidden), mask)
    return hidden_mse(hidden[mask], target, answers), other, hidden


def compare(class_named: Any) -> bool:
    """Print the table of losses; whether all that should agree does."""
    model, original = toy(0), toy(1)
    table = Table("method", "batch", "ours", "theirs", "loss, rel. difference", "gradient, rel. difference")
    for case in cases():
        forget, retain = LENGTHS[case.batch]
        batch = {"forget": part(forget, 1, model), "retain": part(retain, 2, model)}
        mine, module = ours(case, model, original, batch)
        other = theirs(case, class_named, model, original, batch, module)
        said = ["labels shifted for it"] * case.shifted + ["one label more for ours"] * case.longer
        name = case.name + (f" {dict(case.options)}" if case.options else "")
        show(table, [name, case.batch], mine, other, list(model.parameters()), case.note, "; ".join(said))
    for key, note in (("equal", ""), ("unequal", "[b] / [b, 1] broadcasts to [b, b] there")):
        mine, other, hidden = activation_losses(class_named, key)
        show(table, ["RMU, activations", key], mine, other, [hidden], note)
    return table.agrees


TABLES = {"losses": compare, "training": peer_trajectory.compare, "metrics": peer_metrics.compare}


def main() -> None:
    """Parse the arguments and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="a checkout of open-unlearning; without one nothing is done")
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES), help="these tables")
    options = parser.parse_args()
    if options.peer is None:
        print("skipped: no checkout of open-unlearning was given (--peer DIR)")
        return
    with imported(options.peer) as class_named:
        agree = {name: TABLES[name](class_named) for name in options.only}
    if not all(agree.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
