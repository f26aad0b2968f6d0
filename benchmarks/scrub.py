"""Erasing what a layer reads of the forget set alone, and repairing the rest: does it keep a relearning attack out?

    python benchmarks/scrub.py [--fold 2] [--seeds 0 1 2] [--only gradient_difference scrub ...] [--output DIR]

A round takes second moments A_f and A_r of every linear layer's inputs on forget and retain sequences, solves
A_f v = ρ (A_r + εI) v, and takes the v of the largest ρ, as many as hold at most ``--budget`` percent of the retain
inputs' energy. With M = A_r + εI, P = M V Vᵀ is the projector whose removal takes away what V reads and changes retain
outputs least: W ← W (I − αP). Then the weights are trained on the divergence from the original on the retain set, in
one form with W's product with P's range held fixed, so that nothing is rebuilt there. After ``--rounds`` of this,
gradient difference goes on until the forget probability is the oracle's (trained from scratch without these people),
exactly; where a round ends below it, the weights are put between the last two rounds. Forms:

    gradient_difference   nothing before it
    scrub                 the above
    random                V at random, as many, of the same retain energy in every layer: the control
    scrub_free            the repair is not held off P's range
    scrub_alone           rounds until the forget score is reached, no gradient difference

Each is attacked as penalty_conditions.py does, over ``--attack_rates`` and ``--attack_seeds``. Data are the embedded
model's people of a fold (``python -m benchmarks.robustness.people``). What is in ``--output`` is kept: take another
directory for other settings.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import penalty_conditions as conditions
import torch
from penalty_arms import Arm
from penalty_tables import interval, recovered, spread
from robustness import people
from robustness.matching import met
from scipy.linalg import eigh
from timing import markdown
from torch import Tensor

from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.answers import AnswerModel, input_positions
from lightning_ssiuu.models.export import save_pretrained
from lightning_ssiuu.models.loading import load_model, load_tokenizer
from lightning_ssiuu.objectives.cir import linear_layers
from lightning_ssiuu.objectives.losses import kl_divergence
from lightning_ssiuu.training.shards import snapshot
from lightning_ssiuu.utils.files import write_json

FORMS = ["gradient_difference", "scrub", "random", "scrub_free", "scrub_alone"]
TENSORS = ("input_ids", "attention_mask", "labels")
TOLERANCE = 0.05  # percentage points


@contextmanager
def padded(model: AnswerModel) -> Iterator[None]:
    """Inside, a layer's input is [sequences, tokens, d]."""
    packs, model.packs = model.packs, False
    try:
        yield
    finally:
        model.packs = packs


@torch.no_grad()
def moments(model: AnswerModel, loader: Any, split: str, names: list[str], tokens: str) -> dict[str, Tensor]:
    """Mean of x xᵀ over the inputs x of each layer, on the tokens that predict an answer's, or on all before those."""
    sums: dict[str, Any] = dict.fromkeys(names, 0.0)
    counted, mask = 0, torch.empty(0)

    def add(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0][mask].double()
            sums[name] = sums[name] + x.T @ x

        return model.hf.get_submodule(name).register_forward_pre_hook(hook)

    hooks = [add(name) for name in names]
    with padded(model):
        for batch in loader:
            part = batch[split]
            mask = input_positions(part["attention_mask"], part["labels"])
            if tokens == "answers":
                mask &= part["labels"].roll(-1, 1) != -100
            counted += int(mask.sum())
            model(*(part[key] for key in TENSORS))
    for hook in hooks:
        hook.remove()
    return {name: total / counted for name, total in sums.items()}


def energy(v: Tensor, m: Tensor, a_r: Tensor) -> float:
    """Percent of the retain inputs' energy in P x, P = M V Vᵀ."""
    u = m @ v
    return 100 * float(((u.T @ u) * (v.T @ a_r @ v)).sum() / a_r.trace())


def chosen(a_f: Tensor, a_r: Tensor, m: Tensor, budget: float, least: float) -> Tensor:
    """V ``[d, q]`` with VᵀMV = I, of the largest ratios, above ``least``, within the budget."""
    ratios, vectors = eigh(a_f.numpy(), m.numpy())
    v = torch.from_numpy(vectors.copy()).flip(1)
    q = int((ratios > least).sum())
    low = 0
    while low < q:  # the energy grows with q
        middle = (low + q + 1) // 2
        low, q = (middle, q) if energy(v[:, :middle], m, a_r) <= budget else (low, middle - 1)
    return v[:, :q]


def random_like(v: Tensor, m: Tensor, a_r: Tensor, generator: torch.Generator) -> Tensor:
    """As many directions at random, VᵀMV = I, whose energy is the nearest: without ever more of M's main directions."""
    values, vectors = torch.linalg.eigh(m)
    d, q = v.shape
    drawn = []
    for size in range(d, q - 1, -1):
        frame = torch.linalg.qr(torch.randn(size, q, generator=generator, dtype=m.dtype))[0]
        drawn.append(vectors[:, :size] @ (values[:size, None] ** -0.5 * frame))
    wanted = math.log(energy(v, m, a_r))
    return min(drawn, key=lambda each: abs(math.log(energy(each, m, a_r)) - wanted))


class Scrub:
    """Rounds of erasing and repair of one model."""

    def __init__(self, options: argparse.Namespace, form: str, seed: int) -> None:
        L.seed_everything(seed, verbose=False)
        self.options, self.form, self.generator = options, form, torch.Generator().manual_seed(seed)
        self.model, self.tokenizer = AnswerModel(load_model("tiny")), load_tokenizer("tiny")
        self.original = copy.deepcopy(self.model).requires_grad_(False)
        self.data = conditions.data_of(options, seed)
        repair = conditions.data_of(options, seed, train_on="retain", batch_size=options.retain_batch)
        self.batches = itertools.chain.from_iterable(repair.train_dataloader() for _ in itertools.count())
        self.names = linear_layers(self.model.hf, attention=options.layers == "all")
        self.guards: dict[str, Tensor] = {}  # orthonormal, of all that was erased, by layer

    def score(self, split: str = "forget") -> float:
        loaders = [self.data.eval_dataloader(split)]
        return evaluate(self.model, self.tokenizer, loaders, ["probability"])[split]["probability"]

    @torch.no_grad()
    def erase(self) -> dict[str, float]:
        """Take from every layer what it reads along its directions; how many these are, and their energy."""
        o, found = self.options, []
        a_f, a_r = (
            moments(self.model, self.data.eval_dataloader(split), split, self.names, o.tokens)
            for split in ("forget", "retain")
        )
        for name in self.names:
            layer, energies = self.model.hf.get_submodule(name), a_r[name]
            m = energies + o.ridge * energies.trace() / len(energies) * torch.eye(len(energies), dtype=torch.float64)
            v = chosen(a_f[name], energies, m, o.budget, o.least_ratio)
            if v.shape[1] == 0:
                continue
            ratio = float((v.T @ a_f[name] @ v).trace() / v.shape[1])
            if self.form == "random":
                v = random_like(v, m, energies, self.generator)
            found.append((v.shape[1], energy(v, m, energies), ratio, float((v.T @ a_f[name] @ v).trace() / v.shape[1])))
            u, weight = m @ v, layer.weight.double()
            erased = weight - o.alpha * weight @ u @ v.T
            known = self.guards.get(name, u[:, :0])
            fresh = torch.linalg.qr(u)[0]
            if o.noise:
                noise = torch.randn(len(weight), fresh.shape[1], generator=self.generator, dtype=torch.float64)
                erased += o.noise * weight.std() * noise @ fresh.T
            layer.weight.copy_(erased)
            self.guards[name] = torch.linalg.qr(torch.cat([known, fresh], 1))[0]
        keys = ("directions", "retain_energy", "ratio", "ratio_taken")
        return {key: mean(column) for key, column in zip(keys, zip(*found, strict=True), strict=True)}

    def repair(self) -> None:
        """Train on the divergence from the original."""
        parameters = list(self.model.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=self.options.repair_rate, weight_decay=0.0)
        layers: dict[str, Any] = {name: self.model.hf.get_submodule(name) for name in self.guards}
        guards = {} if self.form == "scrub_free" else {name: q.float() for name, q in self.guards.items()}
        with torch.no_grad():
            held = {name: layers[name].weight @ q for name, q in guards.items()}
        for batch in itertools.islice(self.batches, self.options.repair_steps):
            inputs = [batch["retain"][key] for key in TENSORS]
            with torch.no_grad():
                target = self.original(*inputs).logits
            optimizer.zero_grad()
            kl_divergence(self.model(*inputs), target).backward()
            optimizer.step()
            with torch.no_grad():
                for name, q in guards.items():
                    layers[name].weight += (held[name] - layers[name].weight @ q) @ q.T

    def run(self, rounds: int, level: float) -> list[dict[str, Any]]:
        """So many rounds, or fewer if the level is met; what each did."""
        parameters, told = list(self.model.parameters()), []
        for _ in range(rounds):
            before = snapshot(parameters)
            row: dict[str, Any] = self.erase()
            row |= {f"erased {split}": self.score(split) for split in ("forget", "retain")}
            self.repair()
            told.append(row | {split: self.score(split) for split in ("forget", "retain", "test")})
            if told[-1]["forget"] <= level:
                met(parameters, before, snapshot(parameters), self.score, level, TOLERANCE)
                break
        return told


def fit(options: argparse.Namespace, form: str, seed: int, folder: Path) -> None:
    """Unlearn once and save."""
    begin, rows = time.process_time(), []
    if form != "gradient_difference":
        scrub = Scrub(options, form, seed)
        rows = scrub.run(options.most_rounds if form == "scrub_alone" else options.rounds, options.level)
        write_json(folder / "scrub.json", rows)
        print(
            form, seed, *(json.dumps({k: round(v, 3) for k, v in row.items()}) for row in rows), sep="\n  ", flush=True
        )
        save_pretrained(scrub.model.hf, scrub.tokenizer, folder / "model")
        if form == "scrub_alone" or rows[-1]["forget"] <= options.level:
            scores = {split: scrub.score(split) for split in ("forget", "retain", "test")}
            row = {"steps": 0, "scores": scores, "cpu_seconds": time.process_time() - begin}
            write_json(folder / "fit.json", row)
            return
        options = argparse.Namespace(**{**vars(options), "checkpoint": str(folder / "model")})
    conditions.fit(options, Arm(), seed, folder)
    found = json.loads((folder / "fit.json").read_text())
    write_json(folder / "fit.json", found | {"cpu_seconds": time.process_time() - begin})


def oracle_of(options: argparse.Namespace, seed: int) -> Path:
    """The oracle's directory."""
    folder = options.output / "oracle" / str(seed)
    if not (folder / "metrics.json").is_file():
        people.main(["--fold", str(options.fold), "--seed", str(seed), "--output", str(folder)])
    return folder


def report(options: argparse.Namespace, before: dict[str, float]) -> None:
    """Print and write the table; differences are paired by training seed."""
    found: dict[str, dict[int, Any]] = {}
    for form, seed in itertools.product(["oracle", *FORMS], options.seeds):
        folder = options.output / form / str(seed)
        if (folder / "attack.json").is_file():
            name = "metrics" if form == "oracle" else "fit"
            attack = json.loads((folder / "attack.json").read_text())
            found.setdefault(form, {})[seed] = json.loads((folder / f"{name}.json").read_text()) | attack
    header = ["", "n", "steps", "forget", "retain", "test", "CPU s"]
    header += [f"{what}, p {p}" for p in (0.1, 0.3) for what in ("highest", "beyond the oracle", "beyond GD")]
    rows = [["before", "", "", *(f"{before[split]:.3g}" for split in ("forget", "retain", "test")), *[""] * 7]]
    for form, runs in found.items():
        scores = [run["after"]["scores"] if form == "oracle" else run["scores"] for run in runs.values()]
        value = [
            [s[k]["probability"] if form == "oracle" else s[k] for s in scores] for k in ("forget", "retain", "test")
        ]
        cells = [form, str(len(runs)), spread([run["steps"] for run in runs.values()]), *map(spread, value)]
        cells.append("" if form == "oracle" else spread([run["cpu_seconds"] for run in runs.values()]))
        for p in (0.1, 0.3):
            highest = {seed: recovered(run["curves"], p) for seed, run in runs.items()}
            cells.append(spread(list(highest.values())))
            for base in ("oracle", "gradient_difference"):
                known = [
                    highest[s] - recovered(run["curves"], p) for s, run in found.get(base, {}).items() if s in runs
                ]
                cells.append("" if form in ("oracle", base) or not known else interval(known))
        rows.append(cells)
    text = markdown(header, rows)
    (options.output / "report.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fold", type=int, default=2, help="which six people are forgotten")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--only", nargs="+", default=FORMS, choices=FORMS)
    parser.add_argument("--output", type=Path, default=Path("runs/scrub"))
    parser.add_argument("--level", type=float, help="forget probability of all; default: that of the seed's oracle")
    parser.add_argument("--budget", type=float, default=0.2, help="percent of the retain energy, per layer and round")
    parser.add_argument("--least_ratio", type=float, default=2.0, help="smallest ρ")
    parser.add_argument(
        "--ridge", type=float, default=0.01, help="ε, in parts of the mean retain energy of a direction"
    )
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--noise", type=float, default=0.0, help="σ, in parts of the weights' standard deviation")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--most_rounds", type=int, default=10, help="of scrub_alone")
    parser.add_argument("--repair_steps", type=int, default=50, help="of a round")
    parser.add_argument("--repair_rate", type=float, default=4e-4)
    parser.add_argument("--tokens", choices=["answers", "all"], default="answers")
    parser.add_argument("--layers", choices=["feed_forward", "all"], default="all")
    parser.add_argument("--rate", type=float, default=4e-4, help="of gradient difference")
    parser.add_argument("--retain_weight", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--retain_batch", type=int, default=36)
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--attack_rates", type=float, nargs="+", default=[3e-4, 1e-3])
    parser.add_argument("--attack_seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--attack_epochs", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = options.output / "people"
    people.main(["--fold", str(options.fold), "--output", str(given)])
    options.checkpoint, options.forget, options.retain, options.test = (
        "tiny",
        *(str(given / f"{split}.jsonl") for split in ("forget", "retain", "test")),
    )
    plain = Scrub(options, "scrub", 0)
    before = {split: plain.score(split) for split in ("forget", "retain", "test")}
    fixed = options.level
    for seed in options.seeds:
        if fixed is None:
            oracle = oracle_of(options, seed)
            scores = json.loads((oracle / "metrics.json").read_text())["after"]["scores"]
            options.level = scores["forget"]["probability"]
            conditions.attack(options, Arm(), seed, oracle, "attack", "probability")
        for form in options.only:
            folder = options.output / form / str(seed)
            if not (folder / "fit.json").is_file():
                folder.mkdir(parents=True, exist_ok=True)
                fit(options, form, seed, folder)
            conditions.attack(options, Arm(), seed, folder, "attack", "probability")
            print(form, seed, json.loads((folder / "fit.json").read_text())["scores"], flush=True)
    report(options, before)


if __name__ == "__main__":
    main()
