"""The suite ``tofu`` on files named as published, against loops over single answers."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from scipy.stats import ks_2samp
from toys.cli import command, read_json
from toys.data import byte_tokenizer
from toys.models import answer_model

from lightning_ssiuu import TOFU, UserError, evaluate
from lightning_ssiuu.datamodules import QAExample
from lightning_ssiuu.evaluation.options import split_options
from lightning_ssiuu.evaluation.predictions import Predictions
from lightning_ssiuu.evaluation.scores import find_score
from lightning_ssiuu.evaluation.signals import signal_of
from lightning_ssiuu.evaluation.suites import SUITES, measure
from lightning_ssiuu.evaluation.suites.base import Reading
from lightning_ssiuu.evaluation.suites.measure import measure_suite, read, suite_sets
from lightning_ssiuu.models.answers import AnswerModel

SUITE = SUITES["tofu"]
FILES = ("forget01_perturbed", "retain_perturbed", "holdout01", "real_authors_perturbed", "world_facts_perturbed")
SHORT = "rouge_l(measure=recall, stemmed=true, new_tokens=6)"
ROUGES = [name for name in SUITE.figures if name.endswith("ROUGE")]
Log = Mapping[str, Mapping[str, Any]]


def rows(file: str) -> list[dict[str, Any]]:
    """Three items, with the columns that the published file has."""
    kept = []
    for n, word in enumerate(("ink", "a lark", "two plums")):
        row: dict[str, Any] = {"question": f"SECRET {file[:4]}{n}?", "answer": f"It is {word} {file[0]}."}
        if file != "holdout01":
            row["perturbed_answer"] = [f"It is {other}." for other in ("rye", "no hen", "6 cats")[: 2 + (n > 3)]]
        if file in FILES[:2]:
            row["paraphrased_answer"] = f"Of {word}."
        kept.append(row)
    return kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tofu")
    for file in FILES:
        lines = "".join(json.dumps(row) + "\n" for row in rows(file))
        (path / f"{file}.json").write_text(lines, encoding="utf-8")  # JSON lines, as on the hub
    return path


@pytest.fixture(scope="module")
def models() -> dict[str, AnswerModel]:
    return {name: answer_model(seed=n, vocab_size=264) for n, name in enumerate(("model", "reference"))}


@pytest.fixture(scope="module")
def data(folder: Path) -> TOFU:
    return TOFU(str(folder), tokenizer=byte_tokenizer(), template="{question}\n", eval_batch_size=4)


@pytest.fixture(scope="module")
def logs(models: dict[str, AnswerModel], data: TOFU) -> dict[str, Log]:
    """Of both models; texts of six tokens, for speed."""
    figures = {name: replace(f, score=SHORT) if name in ROUGES else f for name, f in SUITE.figures.items()}
    figures["forget_Q_A_ngram_entropy"] = replace(
        SUITE.figures["forget_Q_A_ngram_entropy"], score="ngram_entropy(new_tokens=6)"
    )
    suite = replace(SUITE, figures=figures)
    names = suite.wanted()
    sets = suite_sets(data, suite.readings(names))
    reference = measure_suite(models["reference"], data, sets, suite, names)
    return {
        "reference": reference,
        "model": measure_suite(models["model"], data, sets, suite, suite.wanted(None, True), reference),
    }


def logps(model: AnswerModel, question: str, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of an answer and its end token: log-probabilities of the whole vocabulary, and the tokens."""
    prompt, said = (byte_tokenizer()(text)["input_ids"] for text in (f"{question}\n", answer))
    ids = torch.tensor([[*prompt, *said, byte_tokenizer().eos_token_id]])
    return model.hf(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1), ids[0, len(prompt) :]


def loss(model: AnswerModel, question: str, answer: str) -> float:
    vocabulary, tokens = logps(model, question, answer)
    return -vocabulary.gather(1, tokens.unsqueeze(1)).mean().item()


def ratios(model: AnswerModel, file: str, true: str) -> list[float]:
    return [
        math.exp(
            loss(model, row["question"], row[true])
            - mean(loss(model, row["question"], w) for w in row["perturbed_answer"])
        )
        for row in rows(file)
    ]


def test_probabilities_and_truth_ratios(models: dict[str, AnswerModel], logs: dict[str, Log]) -> None:
    model, log = models["model"], logs["model"]
    for name, file in (("forget", FILES[0]), ("retain", FILES[1]), ("ra", FILES[3]), ("wf", FILES[4])):
        probabilities = [math.exp(-loss(model, row["question"], row["answer"])) for row in rows(file)]
        assert log[f"{name}_Q_A_Prob"]["agg_value"] == pytest.approx(mean(probabilities), abs=1e-9)
        true = "paraphrased_answer" if name in ("forget", "retain") else "answer"
        expected = ratios(model, file, true)
        found = log[f"{name}_Truth_Ratio"]
        assert [one["score"] for one in found["value_by_index"].values()] == pytest.approx(expected, rel=1e-6)
        worth = [min(t, 1 / t) if name == "forget" else max(0, 1 - t) for t in expected]
        assert found["agg_value"] == pytest.approx(mean(worth), rel=1e-6)
        if name in ("ra", "wf"):
            wrong = [[math.exp(-loss(model, r["question"], w)) for w in r["perturbed_answer"]] for r in rows(file)]
            normalised = mean(p / (p + sum(others)) for p, others in zip(probabilities, wrong, strict=True))
            assert log[f"{name}_Q_A_Prob_normalised"]["agg_value"] == pytest.approx(normalised, rel=1e-6)
    listed = log["forget_Q_A_PERT_Prob"]["value_by_index"]["1"]
    assert listed["prob"] == pytest.approx([math.exp(-one) for one in listed["avg_loss"]])
    both = [ratios(each, FILES[0], "paraphrased_answer") for each in models.values()]
    assert log["forget_quality"]["agg_value"] == pytest.approx(ks_2samp(*both).pvalue)


def test_utility_is_the_harmonic_mean_of_nine(logs: dict[str, Log]) -> None:
    utility = SUITE.figures["model_utility"]
    assert len(utility.made_of) == 9
    assert all(0 <= logs["model"][name]["agg_value"] <= 1 for name in utility.made_of)
    values = [0.1 * n for n in range(1, 10)]
    log = {name: {"agg_value": value} for name, value in zip(utility.made_of, values, strict=True)}
    assert utility.entry({}, log, None)["agg_value"] == pytest.approx(9 / sum(1 / value for value in values))
    assert utility.entry({}, log | {utility.made_of[0]: {"agg_value": 0.0}}, None)["agg_value"] == 0
    assert utility.entry({}, log | {utility.made_of[0]: {"agg_value": None}}, None)["agg_value"] is None


def test_options_of_scores(models: dict[str, AnswerModel], data: TOFU) -> None:
    part = next(iter(data.eval_dataloader("test", data.named_set("world_facts"))))["test"]
    predictions = Predictions(models["model"], data.tokenizer, part)
    assert max(map(len, predictions.generated(6))) <= 6 < max(map(len, predictions.generated(9))) <= 9
    assert predictions.generated(6) == [tokens[:6] for tokens in predictions.generated(9)]
    with_end, without = (find_score(f"probability(eos={eos})").values(predictions) for eos in ("true", "false"))
    own = predictions.answers
    assert own.without_end([0]).targets.tolist() == own.targets.tolist()  # letters and passages have no end token
    for row in range(len(part["labels"])):
        tokens = own.token_logps[own.sequence_index == row].double()
        assert with_end[row].item() == pytest.approx(tokens.mean().exp().item())
        assert without[row].item() == pytest.approx(tokens[:-1].mean().exp().item())
    predictions.tell([tokens * 2 for tokens in predictions.reference_tokens])  # every answer twice
    recall, f1 = (find_score(f"rouge_l(measure={kind}, stemmed=true)").values(predictions) for kind in ("recall", "f1"))
    assert recall.tolist() == pytest.approx([1] * len(recall))
    assert f1.max().item() < 0.8
    for name, told in (
        ("probability(eos=maybe)", "probability with any of these options: eos=true"),
        ("rouge_l(new_tokens=0)", r"rouge_l with .*; new_tokens: a number ≥ 1"),
        ("rouge_l_f1(new_tokens=3)", "rouge_l_f1, which takes no options"),
        ("rouge_l(measure=f2)", "measure=recall or f1, stemmed=false"),
        ("memorized_share(least=0)", r"score: got .memorized_share.*; least: a number ≥ 1"),
        ("rouge_l(measure=f1", r"options as name\(option=value, ...\), each once, and in a list the whole in quotes"),
        ("probability(eos=true)(eos=true)", r"options as name\(option=value, ...\), each once"),
        ("probability()", r"options as name\(option=value, ...\), each once"),
        ("probability(eos)", r"options as name\(option=value, ...\), each once"),
        ("min_k(k=2)", "one of .*'probability'"),
    ):
        with pytest.raises(UserError, match=told):
            find_score(name, "score")
    assert split_options('class_probability(new_tokens=2, classifier="a, (b)\\u00e9")') == (
        "class_probability",
        {"new_tokens": 2, "classifier": "a, (b)é"},
    )
    with pytest.raises(UserError, match=r"min_k with any of these options: k=0.4, eos=true; k: a fraction"):
        signal_of("min_k(k=2)")


def attacked(model: AnswerModel, file: str) -> Iterator[dict[str, float]]:
    """Statistics of the attacks on each answer, the higher the less it looks like a member."""
    for row in rows(file):
        vocabulary, tokens = logps(model, row["question"], row["answer"])
        own = vocabulary.gather(1, tokens.unsqueeze(1)).squeeze(1)
        model.hf.zero_grad()
        own[:-1].mean().backward()
        norms = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
        vocabulary, own = vocabulary.detach(), own.detach()
        size = -own.mean().item()
        mean_, square = ((vocabulary.exp() * vocabulary**k).sum(1) for k in (1, 2))
        standard = (own - mean_) / (square - mean_**2).clamp(min=1e-6).sqrt()
        least = max(1, int(0.4 * (len(own) - 1)))
        yield {
            "mia_loss": size,
            "mia_zlib": size / len(zlib.compress(byte_tokenizer().decode(tokens[:-1]).encode())),
            "mia_min_k": -own[:-1].sort().values[:least].mean().item(),
            "mia_min_k_plus_plus": -standard[:-1].sort().values[:least].mean().item(),
            "mia_gradnorm": mean(norms),
        }
    model.hf.zero_grad(set_to_none=True)


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    return mean((m < o) + (m == o) / 2 for m in members for o in others)


def test_membership_attacks(models: dict[str, AnswerModel], logs: dict[str, Log]) -> None:
    sets = {of: [*attacked(models["model"], file)] for of, file in (("forget", FILES[0]), ("holdout", FILES[2]))}
    for name in sets["forget"][0]:
        found = logs["model"][name]
        for of, each in sets.items():
            assert [one["score"] for one in found[of]["value_by_index"].values()] == pytest.approx(
                [a[name] for a in each]
            )
        assert found["agg_value"] == found["auc"] == auc(*([a[name] for a in each] for each in sets.values()))
    theirs = {
        of: [a["mia_loss"] for a in attacked(models["reference"], file)]
        for of, file in (("forget", FILES[0]), ("holdout", FILES[2]))
    }
    above = [[a["mia_loss"] - b for a, b in zip(sets[of], theirs[of], strict=True)] for of in sets]
    assert logs["model"]["mia_reference"]["agg_value"] == auc(*above)
    own, reference = (1 - logs[name]["mia_min_k"]["agg_value"] for name in ("model", "reference"))
    assert logs["model"]["privleak"]["agg_value"] == pytest.approx(100 * (own - reference) / reference)
    assert logs["reference"]["privleak"]["agg_value"] == pytest.approx(100 * (reference - 0.5) / 0.5)


def test_memorisation_leaves_out_the_end_token(models: dict[str, AnswerModel], logs: dict[str, Log]) -> None:
    strengths, shares = [], []
    for row in rows(FILES[0]):
        vocabulary, tokens = logps(models["model"], row["question"], row["answer"])
        right = (vocabulary.argmax(-1) == tokens)[:-1].tolist()
        first = next((k for k in range(len(right)) if all(right[k:])), len(right) - 1)
        strengths.append(1 - first / len(right))
        shares.append(mean(right))
    assert logs["model"]["extraction_strength"]["agg_value"] == pytest.approx(mean(strengths))
    assert logs["model"]["exact_memorization"]["agg_value"] == pytest.approx(mean(shares))


def test_ranks_share_the_examples(models: dict[str, AnswerModel], data: TOFU, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, one after the other: each reads its share, and together they have what one has alone."""
    readings, examples = [Reading("forget/wrong", "probability")], data.named_set("forget")
    alone = read(models["model"], data, examples, readings)
    shares: list[dict[int, float]] = []

    def first(value: dict[int, float]) -> list[dict[int, float]]:
        shares.append(value)
        return [value, dict.fromkeys(range(6), 0.0)]

    for number, gathering in enumerate((first, lambda value: [*shares, value])):
        monkeypatch.setattr(TOFU, "_ranks", lambda self, number=number: (2, number))
        monkeypatch.setattr(measure, "gathered", gathering)
        found = read(models["model"], data, examples, readings)
    assert len(shares[0]) == 3
    assert found[readings[0]] == [pytest.approx(values) for values in alone[readings[0]]]


def test_what_needs_a_reference_is_left_out_without_one() -> None:
    alone, beside = SUITE.wanted(), SUITE.wanted(None, reference=True)
    assert set(beside) - set(alone) == {"forget_quality", "mia_reference"}
    assert SUITE.wanted(["forget_Truth_Ratio"]) == [
        "forget_Q_A_PARA_Prob",
        "forget_Q_A_PERT_Prob",
        "forget_Truth_Ratio",
    ]
    with pytest.raises(UserError, match=r"figures: got 'forget_qualty'.*did you mean 'forget_quality'"):
        SUITE.wanted(["forget_qualty"])


def test_a_split_has_its_files(folder: Path) -> None:
    data = TOFU(str(folder), split="forget10")
    assert (data.forget, data.retain) == ("forget10", "retain90")
    assert [data.file_of(name) for name in ("forget", "holdout")] == ["forget10_perturbed", "holdout10"]
    assert TOFU(forget="forget05_perturbed", retain="retain95").file_of("holdout") == "holdout05"
    with pytest.raises(UserError, match=r"path: got 'holdout10'.*holdout01"):
        data.named_set("holdout")
    with pytest.raises(UserError, match="split: got 'forget02'"):
        TOFU(split="forget02")  # type: ignore[arg-type]


def test_truth_ratios_of_plain_scores_take_the_paraphrase(models: dict[str, AnswerModel], data: TOFU) -> None:
    options = TOFU(
        str(data.path),
        forget=FILES[0],
        retain=FILES[2],
        tokenizer=byte_tokenizer(),
        template="{question}\n",
        multiple_choice=True,
    )
    part = next(iter(options.eval_dataloader("forget")))["forget"]
    scores = Predictions(models["model"], options.tokenizer, part).truth_scores
    row = rows(FILES[0])[0]
    assert scores[0].item() == pytest.approx(-loss(models["model"], row["question"], row["paraphrased_answer"]))
    assert scores[1].item() == pytest.approx(-loss(models["model"], row["question"], row["perturbed_answer"][0]))


def test_the_command_writes_figures_and_no_text(folder: Path, tmp_path: Path, logs: dict[str, Log]) -> None:
    names = "[forget_quality, mia_reference, privleak, extraction_strength]"
    reference = tmp_path / "retrained.json"
    reference.write_text(json.dumps(logs["reference"]), encoding="utf-8")
    words = ("evaluate", "--suite", "tofu", "--model", "tiny", "--path", folder, "--figures", names)
    done = command(*words, "--reference", reference, "--output", tmp_path / "out")
    assert done.status == 0, done.err
    content, log = (read_json(tmp_path / "out" / name) for name in ("evaluate.json", "TOFU_EVAL.json"))
    assert content["reference"] == "log"
    assert content["n_items"] == {"forget": 3, "holdout": 3}
    assert content["figures"] == {name: entry["agg_value"] for name, entry in log.items()}
    assert 0 <= content["figures"]["forget_quality"] <= 1
    assert not any("SECRET" in file.read_text(encoding="utf-8") for file in (tmp_path / "out").iterdir())
    assert "SECRET" not in done.out + done.err
    assert "forget_quality" in done.out
    again = command(*words, "--reference", tmp_path / "out" / "TOFU_EVAL.json", "--output", tmp_path / "out")
    assert again.status == 2
    assert "output" in again.err
    own = tmp_path / "out" / "TOFU_EVAL.json"
    shutil.copy(own, tmp_path)  # where nothing says whose it is
    result = evaluate("tiny", "tofu", reference=str(tmp_path / own.name), path=str(folder), figures=["privleak"])
    assert result.content["figures"]["privleak"] == 0
    for other in (str(own), "tiny"):
        with pytest.raises(UserError, match="another model: these are the very weights"):
            evaluate("tiny", "tofu", reference=other, path=str(folder), figures=["privleak"])
    content["provenance"]["weights_sha256"]["model"], content["sets_sha256"]["holdout"] = "another", "another"
    (own.parent / "evaluate.json").write_text(json.dumps(content), encoding="utf-8")
    shorter = json.loads(json.dumps(log))
    del shorter["mia_min_k"]["holdout"]["value_by_index"]["2"]
    for broken, told in (
        ({}, "a log without mia_min_k"),
        ({"mia_min_k": {"agg_value": "x"}}, "numbers by example"),
        (shorter, "a log of 2 holdout examples, allowed: one of 3"),
        (log, "a log of the same examples: its set holdout is another"),
    ):
        own.write_text(json.dumps(broken), encoding="utf-8")
        with pytest.raises(UserError, match=told):
            evaluate("tiny", "tofu", reference=str(own), path=str(folder), figures=["privleak"])


def test_a_reference_is_paired_by_index_and_not_by_order() -> None:
    values = {str(n): {"score": float(n % 4)} for n in range(12)}
    own = {"mia_loss": {"forget": {"value_by_index": values}, "holdout": {"value_by_index": values}}}
    mixed = {of: {"value_by_index": dict(sorted(values.items()))} for of in ("forget", "holdout")}  # 0, 1, 10, 11, 2
    entry = SUITE.figures["mia_reference"].entry({}, own, {"mia_loss": mixed})
    assert {each["score"] for each in entry["forget"]["value_by_index"].values()} == {0.0}


class Blank(TOFU):
    """Whose second answers are empty."""

    def named_set(self, name: str) -> Sequence[QAExample]:
        return [replace(e, answer="" if e.example_id == 1 else e.answer) for e in super().named_set(name)]


def test_mistakes(folder: Path) -> None:
    with pytest.raises(UserError, match=r"suite: got 'tofo', allowed: one of .*did you mean 'tofu'"):
        evaluate("tiny", "tofo")
    with pytest.raises(UserError, match=r"path: got .* allowed: null beside data"):
        evaluate("tiny", "tofu", data=TOFU(str(folder)), path=str(folder))
    with pytest.raises(UserError, match=r"figures: got \[\], allowed: null, or figures of the suite tofu: forget_Q_A"):
        evaluate("tiny", "tofu", path=str(folder), figures=[])
    with pytest.raises(UserError, match="blank question or answer in forget, example ids 1"):
        suite_sets(Blank(str(folder)), SUITE.readings(["mia_loss"]))
    with pytest.raises(UserError, match="reference: got None, allowed: a model or its log, which forget_quality"):
        evaluate("tiny", "tofu", path=str(folder), figures=["forget_quality"])
