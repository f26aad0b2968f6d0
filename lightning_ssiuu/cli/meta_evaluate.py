"""``lightning-ssiuu meta-evaluate``: which scores tell models with the knowledge from those without?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from lightning_ssiuu.attacks.base import Target
from lightning_ssiuu.attacks.finetune import relearn
from lightning_ssiuu.cli.parsing import run_function
from lightning_ssiuu.cli.report import Report, print_table
from lightning_ssiuu.datamodules import RelearnDataModule, UnlearningDataModule
from lightning_ssiuu.evaluation.meta import faithfulness, joint, quantization_robustness, relearning_robustness
from lightning_ssiuu.evaluation.runs import run_of
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.evaluation.scores import check_score
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_model, load_tokenizer
from lightning_ssiuu.models.quantization import loading_options
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError, naming
from lightning_ssiuu.utils.files import print_written

_OUTPUT = "meta_evaluation.json"
#: Of the scores here the only one that falls the more is known.
_INVERTED = ("truth_ratio_forget",)


def meta_evaluate(
    knowing: Sequence[str],
    ignorant: Sequence[str],
    unlearned: Sequence[str] | None = None,
    data: UnlearningDataModule | None = None,
    scores: Sequence[str] | None = None,
    inverted: Sequence[str] = _INVERTED,
    p: float = 0.3,
    learning_rate: float = 1e-3,
    epochs: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    quantization: Literal["8bit", "4bit"] | None = "8bit",
    output: str | None = None,
    accelerator: str = "auto",
    precision: Literal["32-true", "bf16-true"] = "32-true",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Judge scores by models whose knowledge is known, and write ``meta_evaluation.json`` (arXiv 2506.12618).

    Faithfulness is the AUC of a score of the forget set between models with the knowledge and models without. With
    ``unlearned`` models robustness is measured, too: relearning a part of the forget set may raise a score no more than
    the ignorant models' mean rise, and rounding the weights may not raise it.

    Args:
        knowing: Models that were taught the forget set; also directories of models or of runs.
        ignorant: Models that never saw it: oracles, of several seeds, or taught other answers.
        unlearned: Models that unlearned it.
        data: The data module; by default that of the first model that lies in a run, else the embedded facts.
        scores: Scores to judge; by default all that need no generated text.
        inverted: Scores that are lower the more is known: 100 minus the score is judged.
        p: Fraction of the forget set that is relearned; the disjoint rest is scored.
        learning_rate: Of that, AdamW's; the default suits small models.
        epochs: Passes over what is relearned.
        seed: Of the selection and the order.
        batch_size: Sequences per step of it.
        quantization: Width of the rounded weights (extra ``[quantization]``); null: none.
        output: Directory for ``meta_evaluation.json``; by default the run of the first model that lies in one.
        accelerator: Lightning's; one device.
        precision: Of the weights.
        overwrite: Replace an earlier one.

    Returns:
        The contents of ``meta_evaluation.json``, in percent.

    Raises:
        UserError: If an argument is outside its range, or there is no such model; nothing is written then.
    """
    for name in [*(scores or []), *inverted]:
        check_score(name)
    if scores is not None and not scores:
        raise UserError("scores", list(scores), "at least one, or null for all that need no generated text")
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(name, value, "at least 1")
    if not learning_rate > 0:
        raise UserError("learning_rate", learning_rate, "a number > 0")
    devices = Devices(accelerator, 1, precision=precision)
    groups = {"knowing": _models("knowing", knowing), "ignorant": _models("ignorant", ignorant)}
    if both := [model for model in groups["ignorant"] if model in groups["knowing"]]:
        raise UserError("ignorant", both[0], "models that are not among the knowing ones")
    groups |= {"unlearned": _models("unlearned", unlearned)} if unlearned is not None else {}
    named = {f"{group}[{n}]": model for group, models in groups.items() for n, model in enumerate(models)}
    subject = next((name for name, model in named.items() if run_of(model)), "knowing[0]")
    with Report(named, data, devices, output, [_OUTPUT], overwrite, subject) as report:
        data = report.data
        data.setup("validate")
        cell = RelearnDataModule(data, "harmful", p, batch_size=batch_size, seed=seed)
        _ = cell.splits  # refused before anything is loaded
        if quantization is not None and unlearned is not None:
            loading_options(quantization, devices.dtype, devices.device)
        with devices.launched():
            measured = {name: _scored(Target(name, model, devices), data, scores) for name, model in named.items()}
            of = {group: [measured[name] for name in named if name.startswith(f"{group}[")] for group in groups}
            judged = [score for score in of["knowing"][0] if all(score in model for model in measured.values())]
            relearned: dict[str, tuple[dict[str, float], dict[str, float]]] = {}
            rounded: dict[str, dict[str, float]] = {}
            if unlearned is not None:
                options = (cell, judged, learning_rate, epochs)
                for name, model in named.items():
                    if not name.startswith("knowing["):
                        relearned[name] = _relearned(Target(name, model, devices), *options)
                    if quantization is not None and name.startswith("unlearned["):
                        rounded[name] = _scored(Target(name, model, devices), data, judged, quantization)
        content = {
            "scores": {score: _judged(score, inverted, measured, relearned, rounded) for score in judged},
            "models": {name: {score: model[score] for score in judged} for name, model in measured.items()},
            "relearned": {name: {"before": pair[0], "after": pair[1]} for name, pair in relearned.items()},
            "quantized": rounded,
            "options": {"p": p, "learning_rate": learning_rate, "epochs": epochs, "seed": seed}
            | {"quantization": quantization, "inverted": [score for score in inverted if score in judged]},
            "n": {group: len(models) for group, models in groups.items()},
        }
        content["provenance"] = report.provenance([content["options"], precision, batch_size])
        try:
            report.write(_OUTPUT, content)
        finally:  # also where the disk refuses
            print_meta_evaluation(content)
        print_written(report.folder, [_OUTPUT])
        return content


def _models(argument: str, given: Sequence[str]) -> list[str]:
    # A directory of models, or of runs, stands for what is in it.
    found = []
    for one in given:
        folder = Path(one).expanduser()
        if not folder.is_dir() or (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
            found.append(one)
            continue
        places = [folder / "model"]  # a run: not what an attack left beside it
        if not (places[0] / "config.json").is_file():
            places = [place for sub in sorted(folder.iterdir()) for place in (sub, sub / "model")]
        if not (inside := [str(place) for place in places if (place / "config.json").is_file()]):
            raise UserError(argument, one, "a model, or a directory of models or runs")
        found += inside
    if not found:
        raise UserError(argument, list(given), "at least one model")
    if twice := [model for model in found if found.count(model) > 1]:
        raise UserError(argument, twice[0], "each model once")
    return found


def _scored(
    target: Target, data: UnlearningDataModule, scores: Sequence[str] | None, width: Any = None
) -> dict[str, float]:
    if width is None:
        model, tokenizer = target.load()
    else:
        options = target.devices
        with naming(target.argument):
            loaded = load_model(target.checkpoint, options.dtype, width, options.device, options.architecture)
            model, tokenizer = AnswerModel(loaded), load_tokenizer(target.checkpoint)
    return evaluate(model, tokenizer, [data.eval_dataloader("forget")], scores)["forget"]


def _relearned(
    target: Target, cell: RelearnDataModule, scores: Sequence[str], rate: float, epochs: int
) -> tuple[dict[str, float], dict[str, float]]:
    # All scores before and after one attack; what it trains on is not scored.
    model, tokenizer = target.load()
    before = evaluate(model, tokenizer, [cell.scored_batches()], scores)["forget"]
    known = {"forget": before[scores[0]]}
    relearn(model, tokenizer, cell, rate, epochs, scores[0], target.name, target.devices, epochs, before=known)
    return before, evaluate(model, tokenizer, [cell.scored_batches()], scores)["forget"]


def _judged(
    score: str,
    inverted: Sequence[str],
    measured: Mapping[str, Mapping[str, float]],
    relearned: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]],
    rounded: Mapping[str, Mapping[str, float]],
) -> dict[str, float]:
    def of(scores: Mapping[str, float]) -> float:
        return 100 - scores[score] if score in inverted else scores[score]

    def among(names: Mapping[str, Any], group: str) -> list[str]:
        return [name for name in names if name.startswith(f"{group}[")]

    pools = [[of(measured[name]) for name in among(measured, group)] for group in ("knowing", "ignorant")]
    found = {"faithfulness": faithfulness(*pools)}
    if relearned:
        oracle = [mean(of(relearned[name][moment]) for name in among(relearned, "ignorant")) for moment in (0, 1)]
        own = [[of(scores) for scores in relearned[name]] for name in among(relearned, "unlearned")]
        found["relearning"] = mean(relearning_robustness(*pair, *oracle) for pair in own)
    if rounded:
        found["quantization"] = mean(quantization_robustness(of(measured[n]), of(rounded[n])) for n in rounded)
    if robust := [found[name] for name in ("relearning", "quantization") if name in found]:
        found["robustness"] = joint(robust)
        found["overall"] = joint([found["faithfulness"], found["robustness"]])
    return found


def print_meta_evaluation(content: Mapping[str, Any]) -> None:
    """Print the contents of ``meta_evaluation.json`` as a table, the most faithful score first."""
    columns = list(next(iter(content["scores"].values())))
    ordered = sorted(content["scores"].items(), key=lambda item: -item[1].get("overall", item[1]["faithfulness"]))
    rows = [[score, *(f"{judged[column]:.1f}" for column in columns)] for score, judged in ordered]
    models = ", ".join(f"{count} {group}" for group, count in content["n"].items())
    print_table([["score", *columns], *rows], f"Meta-evaluation, % ({models})")


def run(args: list[str]) -> None:
    """Parse and run ``meta-evaluate``."""
    run_function(meta_evaluate, "meta-evaluate", args)
