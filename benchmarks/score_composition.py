"""What equal forget scores are made of: the same mean over answers, of which answers and of which of their tokens?

    python benchmarks/score_composition.py runs/tofu [--data tofu] [--objectives npo ssiuu]

Reads the directory of a finished ``python -m benchmarks.robustness`` (without ``--delete_models``). Tokens of the
forget answers are divided by their probability in the oracle of the same seed: *form* (above 1/2: names from the
question, words any such answer has), *facts* (below 1/10), and the rest. For the oracle, the model before and after
teaching, and every objective, the table has the mean log-probability of each, in nats, the correlation of the tokens'
probabilities with the oracle's, and over answers the median and the highest probability (percent, ``exp`` of the mean
log-probability per token), how many are above the oracle's highest, and which one is highest (its place in the forget
set). Mean ± standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from timing import markdown
from torch import Tensor

from lightning_ssiuu.datamodules.base import UnlearningDataModule
from lightning_ssiuu.evaluation.metrics.answers import answer_probability
from lightning_ssiuu.evaluation.results import read_config
from lightning_ssiuu.evaluation.runs import run_data
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import evaluation_mode, load_model

FORM, FACT = 0.5, 0.1
COLUMNS = {
    "form, nats": 2,
    "between": 2,
    "facts, nats": 2,
    "correlation": 2,
    "answers: mean": 1,
    "median": 1,
    "highest": 0,
    "above the oracle's highest": 1,
}


@torch.no_grad()
def token_logps(model: AnswerModel, data: UnlearningDataModule) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the forget answers' tokens in nats, ``[N]``, and of which answer each is, ``[N]``."""
    logps, places, n = [], [], 0
    with evaluation_mode(model):
        for batch in data.eval_dataloader("forget"):
            part = batch["forget"]
            answers = model(part["input_ids"], part["attention_mask"], part["labels"])
            logps.append(answers.token_logps.double())
            places.append(answers.sequence_index + n)
            n += len(part["input_ids"])
    return torch.cat(logps), torch.cat(places)


def composition(logps: Tensor, oracle: Tensor, places: Tensor) -> list[float]:
    """The table's columns of one model: ``[N]`` log-probabilities in nats, the oracle's, and each token's answer.

    The last one is the place of the most probable answer.
    """
    known = oracle.exp()
    form, facts = known > FORM, known < FACT
    own, wanted = (100 * answer_probability(each, places, int(places.max()) + 1) for each in (logps, oracle))
    means = [logps[chosen].mean().item() for chosen in (form, ~form & ~facts, facts)]
    correlation = torch.corrcoef(torch.stack([logps.exp(), known]))[0, 1].item()
    above = float((own > wanted.max()).sum())
    over_answers = own.mean().item(), own.median().item(), own.max().item(), above
    return [*means, correlation, *over_answers, float(own.argmax())]


def checkpoint_of(run: Path) -> str:
    """What a run started from."""
    return read_config(run, "run")["model"]["init_args"]["checkpoint"]


def loaded(folder: Path | str) -> AnswerModel:
    return AnswerModel(load_model(str(folder), torch.float32))


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation over seeds."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {torch.tensor(values).std().item():.{digits}f}"


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", help="the name of one, where there are several")
    parser.add_argument("--objectives", nargs="+", help="all by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads((options.folder / "results.json").read_text(encoding="utf-8"))
    runs = [run for run in results["runs"] if run["phase"] == "test" and run["data"] == (options.data or run["data"])]
    if len({run["data"] for run in runs}) != 1:
        parser.error(f"--data: got {options.data}, allowed: one of {sorted({run['data'] for run in results['runs']})}")
    found: dict[str, dict[int, list[float]]] = {"oracle": {}, "before teaching": {}, "learned": {}}
    oracles: dict[int, tuple[Tensor, Tensor]] = {}
    for run in runs:
        if options.objectives and run["label"] not in options.objectives:
            continue
        seed, model = run["seed"], Path(run["folder"]) / "model"
        data = run_data(str(model), None)
        data.setup("validate")
        if seed not in oracles:
            (oracle,) = (options.folder / "stages" / "oracle").glob(f"{run['data']}.seed{seed}-*/model")
            oracles[seed] = token_logps(loaded(oracle), data)
            start = checkpoint_of(Path(run["folder"]))
            found["oracle"][seed] = composition(oracles[seed][0], *oracles[seed])
            found["learned"][seed] = composition(token_logps(loaded(start), data)[0], *oracles[seed])
            if (Path(start).parent / "config.yaml").exists():
                before = checkpoint_of(Path(start).parent)
                found["before teaching"][seed] = composition(token_logps(loaded(before), data)[0], *oracles[seed])
        found.setdefault(run["label"], {})[seed] = composition(token_logps(loaded(model), data)[0], *oracles[seed])
    print(table(found))


def table(found: Mapping[str, Mapping[int, Sequence[float]]]) -> str:
    """Markdown of all models by name and seed."""
    rows = []
    for name, seeds in found.items():
        if not seeds:
            continue
        *figures, places = zip(*seeds.values(), strict=True)
        which = ", ".join(f"{place:.0f}" for place in sorted(set(places)))
        rows.append([name, str(len(seeds)), *map(spread, figures, COLUMNS.values()), which])
    return markdown(["", "seeds", *COLUMNS, "which is"], rows)


if __name__ == "__main__":
    main()
