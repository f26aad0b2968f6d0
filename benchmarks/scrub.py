"""Erasing what layers read of the forget set alone, and repairing the rest: does it keep a relearning attack out?

    python benchmarks/scrub.py [--fold 2] [--seeds 0 1 2] [--only gradient_difference scrub ...] [--output DIR]

A round takes second moments A_f and A_r of every linear layer's inputs on the forget and the retain set, solves
A_f v = ρ (A_r + εI) v, and takes the v of the largest ρ, as many as hold ``--budget`` percent of the retain inputs'
energy. With M = A_r + εI, P = M V Vᵀ is the oblique projector whose removal takes what V reads and changes retain
outputs least: W ← W (I − αP). Then the weights are trained on the divergence from the original on the retain set,
their product with P's range held, so that nothing is rebuilt there. After ``--rounds`` of this gradient difference goes
on until the forget probability is the oracle's (trained from scratch without these people); where a round ends below
it, the weights are put between that round's beginning and end. Forms:

    gradient_difference   nothing before it
    scrub                 the above
    random                V at random, as many, of the same retain energy in every layer: the control
    repair                the repair's steps alone, nothing erased
    scrub_free            the repair is not held off P's range
    scrub_alone           up to ``--most_rounds`` with ``--budget_alone`` and no gradient difference

Every one is attacked as in penalty_conditions.py. Data are the embedded model's people of a fold
(``benchmarks/robustness/people.py``). What is in ``--output`` is kept: take another directory for other settings.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
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

FORMS = ["gradient_difference", "scrub", "random", "repair", "scrub_free", "scrub_alone"]
SPLITS = ("forget", "retain", "test")
TENSORS = ("input_ids", "attention_mask", "labels")
#: Of penalty_conditions.py: gradient difference with the benchmark's learning rate for it, and the attack.
COMMON: dict[str, Any] = {"checkpoint": "tiny", "rate": 4e-4, "retain_weight": 5.0, "batch": 12, "retain_batch": 36}
COMMON |= {"max_steps": 300, "attack_rates": [3e-4, 1e-3], "attack_epochs": 10}


@torch.no_grad()
def moments(model: AnswerModel, loader: Any, split: str, names: list[str], tokens: str) -> dict[str, Tensor]:
    """Mean of x xᵀ over the inputs x of each layer, on the tokens an answer is predicted from, or on all before it."""
    sums: dict[str, Any] = dict.fromkeys(names, 0.0)
    counted, mask = 0, torch.empty(0)

    def add(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0][mask].double()
            sums[name] = sums[name] + x.T @ x

        return model.hf.get_submodule(name).register_forward_pre_hook(hook)

    hooks = [add(name) for name in names]
    for batch in loader:
        part = batch[split]
        mask = input_positions(part["attention_mask"], part["labels"])
        if tokens == "answers":
            mask &= part["labels"].roll(-1, 1) != -100
        counted += int(mask.sum())
        model.hf(input_ids=part["input_ids"], attention_mask=part["attention_mask"])
    for hook in hooks:
        hook.remove()
    return {name: total / counted for name, total in sums.items()}


def energy(v: Tensor, m: Tensor, a_r: Tensor) -> float:
    """Percent of the retain inputs' energy in P x, P = M V Vᵀ."""
    u = m @ v
    return max(100 * float(((u.T @ u) * (v.T @ a_r @ v)).sum() / a_r.trace()), 1e-12)  # 0 up to rounding


def chosen(a_f: Tensor, a_r: Tensor, m: Tensor, budget: float, least: float) -> Tensor:
    """V ``[d, q]`` with VᵀMV = I, of the largest ratios, above ``least``, within the budget."""
    ratios, vectors = eigh(a_f.numpy(), m.numpy())
    v, low, q = torch.from_numpy(vectors.copy()).flip(1), 0, int((ratios > least).sum())
    while low < q:  # the energy grows with q
        middle = (low + q + 1) // 2
        low, q = (middle, q) if energy(v[:, :middle], m, a_r) <= budget else (low, middle - 1)
    return v[:, :q]


def random_like(v: Tensor, m: Tensor, a_r: Tensor, generator: torch.Generator) -> Tensor:
    """As many directions at random, VᵀMV = I, of the nearest energy: drawn without ever more of M's main directions."""
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
        self.layers: dict[str, Any] = {
            name: self.model.hf.get_submodule(name) for name in linear_layers(self.model.hf, attention=True)
        }
        self.guards: dict[str, Tensor] = {}  # orthonormal, of all that was erased, by layer

    def score(self, *splits: str) -> dict[str, float]:
        loaders = [self.data.eval_dataloader(split) for split in splits]
        found = evaluate(self.model, self.tokenizer, loaders, ["probability"])
        return {split: figures["probability"] for split, figures in found.items()}

    @torch.no_grad()
    def erase(self) -> dict[str, float]:
        """Take from every layer what it reads along its directions; how many these are, energy and ratios."""
        o, names, found = self.options, list(self.layers), []
        a_f, a_r = (
            moments(self.model, self.data.eval_dataloader(split), split, names, o.tokens)
            for split in ("forget", "retain")
        )
        for name, layer in self.layers.items():
            kept, eye = a_r[name], torch.eye(len(a_r[name]), dtype=torch.float64)
            m = kept + o.ridge * kept.trace() / len(kept) * eye
            best = v = chosen(a_f[name], kept, m, o.budget, o.least_ratio)
            if v.shape[1] == 0:
                continue
            if self.form == "random":
                v = random_like(best, m, kept, self.generator)
            ratios = [float((each.T @ a_f[name] @ each).diagonal().mean()) for each in (best, v)]
            found.append((v.shape[1], energy(best, m, kept), energy(v, m, kept), *ratios))
            u, weight = m @ v, layer.weight.double()
            basis = torch.linalg.qr(u)[0]
            noise = torch.randn(len(weight), len(basis.T), generator=self.generator, dtype=torch.float64) @ basis.T
            layer.weight.copy_(weight - o.alpha * weight @ u @ v.T + o.noise * weight.std() * noise)
            self.guards[name] = torch.linalg.qr(torch.cat([self.guards.get(name, u[:, :0]), basis], 1))[0]
        keys = ("directions", "energy of the best", "energy", "ratio of the best", "ratio")
        return {key: mean(column) for key, column in zip(keys, zip(*found, strict=True), strict=bool(found))}

    def repair(self) -> None:
        """Train on the divergence from the original."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.options.repair_rate, weight_decay=0.0)
        guards = {} if self.form == "scrub_free" else {self.layers[name]: q.float() for name, q in self.guards.items()}
        held = {layer: layer.weight.detach() @ q for layer, q in guards.items()}
        for batch in itertools.islice(self.batches, self.options.repair_steps):
            inputs = [batch["retain"][key] for key in TENSORS]
            with torch.no_grad():
                target = self.original(*inputs).logits
            optimizer.zero_grad()
            kl_divergence(self.model(*inputs), target).backward()
            optimizer.step()
            with torch.no_grad():
                for layer, q in guards.items():
                    layer.weight += (held[layer] - layer.weight @ q) @ q.T

    def run(self, rounds: int, level: float) -> list[dict[str, float]]:
        """So many rounds, or fewer if the level is met; what each did."""
        parameters, told = list(self.model.parameters()), []
        for _ in range(rounds):
            before, row = snapshot(parameters), {} if self.form == "repair" else self.erase()
            row |= {f"{split}, erased": value for split, value in self.score(*SPLITS).items()}
            self.repair()
            told.append(row | self.score(*SPLITS))
            if told[-1]["forget"] <= level:
                met(parameters, before, snapshot(parameters), lambda: self.score("forget")["forget"], level, 0.05)
                break
        return told


def fit(options: argparse.Namespace, form: str, seed: int, folder: Path) -> None:
    """Unlearn once and save."""
    begin, folder_file, changed = time.process_time(), folder / "fit.json", vars(options).copy()
    if form == "scrub_alone":
        changed |= {"rounds": options.most_rounds, "budget": options.budget_alone}
    if form != "gradient_difference":
        scrub = Scrub(argparse.Namespace(**changed), form, seed)
        rows = scrub.run(changed["rounds"], options.level)
        write_json(folder / "scrub.json", rows)
        save_pretrained(scrub.model.hf, scrub.tokenizer, folder / "model")
        write_json(folder_file, {"steps": 0, "scores": scrub.score(*SPLITS)})
        changed["checkpoint"] = str(folder / "model")
    if form == "gradient_difference" or (form != "scrub_alone" and rows[-1]["forget"] > options.level):
        conditions.fit(argparse.Namespace(**changed), Arm(), seed, folder)
    write_json(folder_file, json.loads(folder_file.read_text()) | {"cpu_seconds": time.process_time() - begin})


def report(options: argparse.Namespace, before: dict[str, float]) -> None:
    """Print and write the table; differences are paired by training seed."""
    found: dict[str, dict[int, Any]] = {}
    for form, seed in itertools.product(["oracle", *FORMS], options.seeds):
        files = [options.output / form / str(seed) / name for name in ("fit.json", "attack.json")]
        if all(file.is_file() for file in files):
            found.setdefault(form, {})[seed] = json.loads(files[0].read_text()) | json.loads(files[1].read_text())
    header = ["", "n", "steps", *SPLITS, "CPU s"]
    header += [f"{what}, p {p}" for p in (0.1, 0.3) for what in ("highest", "beyond the oracle", "beyond GD")]
    rows = [["before", "", "", *(f"{before[split]:.3g}" for split in SPLITS), *[""] * 7]]
    for form, runs in found.items():
        values = [[run["scores"][split] for run in runs.values()] for split in SPLITS]
        values = [[run["steps"] for run in runs.values()], *values, [run["cpu_seconds"] for run in runs.values()]]
        cells = [form, str(len(runs)), *map(spread, values)]
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


def oracle_level(options: argparse.Namespace, seed: int) -> float:
    """The forget probability of a seed's oracle, trained if it is not there."""
    folder, begin = options.output / "oracle" / str(seed), time.process_time()
    if not (folder / "fit.json").is_file():
        people.main(["--fold", str(options.fold), "--seed", str(seed), "--output", str(folder)])
        found = json.loads((folder / "metrics.json").read_text())
        scores = {split: found["after"]["scores"][split]["probability"] for split in SPLITS}
        seconds = time.process_time() - begin
        write_json(folder / "fit.json", {"steps": found["steps"], "scores": scores, "cpu_seconds": seconds})
    conditions.attack(options, Arm(), seed, folder, "attack", "probability")
    return json.loads((folder / "fit.json").read_text())["scores"]["forget"]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(**COMMON)
    parser.add_argument("--fold", type=int, default=2, help="which six people are forgotten")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--attack_seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=FORMS, choices=FORMS)
    parser.add_argument("--output", type=Path, default=Path("runs/scrub"))
    parser.add_argument("--level", type=float, help="forget probability of all; default: that of the seed's oracle")
    parser.add_argument("--tokens", choices=["answers", "all"], default="all")
    parser.add_argument("--budget", type=float, default=0.2, help="percent of the retain energy, per layer and round")
    parser.add_argument("--budget_alone", type=float, default=4.0, help="the same, of scrub_alone")
    parser.add_argument("--least_ratio", type=float, default=2.0, help="smallest ρ")
    parser.add_argument("--ridge", type=float, default=0.01, help="ε, in parts of a direction's mean retain energy")
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--noise", type=float, default=0.0, help="in parts of the weights' standard deviation")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--most_rounds", type=int, default=6, help="of scrub_alone")
    parser.add_argument("--repair_steps", type=int, default=50, help="of a round")
    parser.add_argument("--repair_rate", type=float, default=4e-4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    given, fixed = options.output / "people", options.level
    people.main(["--fold", str(options.fold), "--output", str(given)])
    options.forget, options.retain, options.test = (str(given / f"{split}.jsonl") for split in SPLITS)
    before = Scrub(options, "scrub", 0).score(*SPLITS)
    for seed in options.seeds:
        options.level = oracle_level(options, seed) if fixed is None else fixed
        for form in options.only:
            folder = options.output / form / str(seed)
            if not (folder / "attack.json").is_file():
                folder.mkdir(parents=True, exist_ok=True)
                fit(options, form, seed, folder)
                conditions.attack(options, Arm(), seed, folder, "attack", "probability")
    report(options, before)


if __name__ == "__main__":
    main()
