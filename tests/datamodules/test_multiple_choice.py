"""Multiple choice under a prompt that lists the options: encoding, ranking, generated answers, runs and attacks."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys.cli import RECIPES, attacking, command, fit, read_json
from toys.clusters import write_faithun
from toys.data import CHAT, Toy, byte_tokenizer, examples

from lightning_ssiuu import Facts
from lightning_ssiuu.datamodules.encoding import INSTRUCTION, Encoder
from lightning_ssiuu.datamodules.splits import QAExample, Splits
from lightning_ssiuu.evaluation.metrics import AnswerAccuracy
from lightning_ssiuu.evaluation.metrics.answers import generated_choice_accuracy, named_choice
from lightning_ssiuu.evaluation.scorer import Scorer, evaluate
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_model
from lightning_ssiuu.utils.errors import UserError

SCORES = ["choice_likelihood", "choice_generation"]


# -- which option a text names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options", "place"),
    [
        ("Paris", ["Paris", "Rome"], 0),
        (" PARIS.\n", ["Rome", "paris"], 1),
        ("- Rome", ["Paris", "Rome"], 1),
        ("The answer is Rome, not Paris.", ["Paris", "Rome"], 1),
        ("Paris Rome", ["Rome", "Paris"], 1),
        ("", ["Paris", "Rome"], None),
        ("Berlin", ["Paris", "Rome"], None),
        ("Pariser Platz", ["Paris", "Rome"], None),  # whole words only
        ("Nigeria", ["Niger", "Nigeria"], 1),
        ("New York City", ["New York", "New York City", "York"], 1),  # the longest of those that begin there
        ("York, New York", ["New York", "York"], 1),
        ("New", ["New York", "York"], None),
        ("New York", ["New York City", "York"], 1),
        ("J. R. R. Tolkien", ["J.R.R. Tolkien", "Tolkien"], 0),
        ("São Paulo", ["São Paulo", "Paulo"], 0),
        ("Straße", ["STRASSE"], 0),
        ("42", ["4", "42"], 1),
        ("Rome", ["Rome", "ROME."], None),  # nobody could tell which
        ("Rome, Oslo", ["Rome", "rome", "Oslo"], None),
        ("...", ["...", "Rome"], None),  # no words in it: never named
        ("Rome", [], None),
    ],
)
def test_named_choice_by_hand(text: str, options: list[str], place: int | None) -> None:
    assert named_choice(text, options) == place


def by_search(text: str, options: list[str]) -> int | None:
    """The same over single spaces, by looking into the text at every place for every option, longest first."""
    for place in range(len(text)):
        for option in sorted(options, key=len, reverse=True):
            if f" {text} "[place:].startswith(f" {option} "):
                return options.index(option)
    return None


def test_named_choice_against_a_search() -> None:
    draw = random.Random(0)
    found = Counter()
    for _ in range(500):
        words = [" ".join(draw.choices("abc", k=draw.randint(1, 3))) for _ in range(3)]
        options = list(dict.fromkeys(words))
        text = " ".join(draw.choices("abcd", k=draw.randint(0, 8)))
        assert named_choice(text, options) == by_search(text, options)
        found[named_choice(text, options)] += 1
    assert min(found[place] for place in (None, 0, 1, 2)) > 20


def test_generated_choice_accuracy_by_hand() -> None:
    correct = generated_choice_accuracy(["a", "b", "", "it is a"], [["a", "b"]] * 4)
    assert correct.tolist() == [True, False, False, True]
    assert correct.dtype == torch.bool
    assert generated_choice_accuracy([], []).shape == (0,)
    with pytest.raises(ValueError, match="shorter"):
        generated_choice_accuracy(["a", "b"], [["a"]])
    for kind in SCORES:
        metric = AnswerAccuracy(kind)
        metric.update(correct)
        assert metric.compute().item() == 50


# -- encoding -----------------------------------------------------------------------------------------------------


def text_of(encoder: Encoder, ids: list[int]) -> str:
    """Text of a tokenizer of ASCII bytes, which has no decoder."""
    return "".join(encoder.tokenizer.convert_ids_to_tokens(ids)).replace("Ġ", " ").replace("Ċ", "\n")


def prompt_of(encoder: Encoder, example: QAExample) -> str:
    texts = {text_of(encoder, s.input_ids[: s.n_prompt]) for s in encoder.choices(example)}
    (text,) = texts  # the same before every option
    return text


def test_the_prompt_lists_every_option_in_an_order_of_the_id_alone() -> None:
    encoder = Encoder(byte_tokenizer(), choice_template="instruction")
    places, orders = Counter(), Counter()
    for number in range(300):
        example = QAExample(number, "Which?", "true", ("wrong", "false"))
        text = prompt_of(encoder, example)
        instruction, _ = INSTRUCTION.split("{question}")
        assert text.startswith(f"{instruction}Which?\n")
        listed = text.split("Options:\n")[1].removesuffix("\nAnswer:").split("\n")
        assert sorted(listed) == ["- false", "- true", "- wrong"]
        places[listed.index("- true")] += 1
        orders[tuple(listed)] += 1
        renamed = QAExample(number, "Whose?", "yes", ("no", "maybe"))
        assert prompt_of(encoder, renamed).split("\n").index("- yes") == text.split("\n").index("- true")
    assert all(70 < count < 130 for count in places.values())  # 100 each, give or take four standard deviations
    assert len(orders) == 6
    text = prompt_of(encoder, QAExample(7, "Which day?", "Monday", ("Friday", "Sunday")))  # the same in every version
    assert text == INSTRUCTION.format(question="Which day?", options="- Friday\n- Sunday\n- Monday")


def test_the_true_answer_is_the_first_sequence() -> None:
    encoder = Encoder(byte_tokenizer(), choice_template="instruction")
    example = QAExample(3, "Which?", "true", ("wrong", "false"))
    completions = [text_of(encoder, s.input_ids[s.n_prompt :]) for s in encoder.choices(example)]
    assert completions == [" true<eos>", " wrong<eos>", " false<eos>"]


def test_a_template_of_ones_own_and_text_that_looks_like_one() -> None:
    example = QAExample(3, "What is {options}?", "{question}", ("{0}", "b"))
    encoder = Encoder(byte_tokenizer(), choice_template="{options}|{question}|{other} ")
    options = sorted(prompt_of(encoder, example).split("|")[0].split("\n"))
    assert options == ["- b", "- {0}", "- {question}"]
    assert prompt_of(encoder, example).split("|")[1:] == ["What is {options}?", "{other} "]
    first = encoder.choices(example)[0]
    assert text_of(encoder, first.input_ids[first.n_prompt :]) == "{question}<eos>"  # no second space
    chat = Encoder(byte_tokenizer(chat=CHAT), "chat", choice_template="{question}\n{options}")
    assert prompt_of(chat, QAExample(1, "Who?", "me", ("you",))) in (
        "<user>Who?\n- me\n- you<a>",
        "<user>Who?\n- you\n- me<a>",
    )
    for template in ("plain", "{question}", "{options}", ""):
        with pytest.raises(UserError, match="choice_template: got"):
            Encoder(byte_tokenizer(), choice_template=template)


def test_only_where_asked_for_and_possible() -> None:
    plain, asked = Toy(), Toy(choice_template="instruction")
    before, after = (next(iter(data.eval_dataloader("forget")))["forget"] for data in (plain, asked))
    choices = after.pop("choices")
    assert choices["option_of"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    options = before.pop("options"), after.pop("options")
    for one, other in ((before, after), options):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    alone = next(iter(Toy(choice_template="instruction", multiple_choice=False).eval_dataloader("forget")))["forget"]
    assert sorted(alone) == ["attention_mask", "choices", "example_id", "input_ids", "labels"]
    assert all(set(part) == set(before) for part in next(iter(asked.train_dataloader())).values())
    without = Toy(Splits(examples(0, 4), examples(10, 4)), choice_template="instruction")
    assert "choices" not in next(iter(without.eval_dataloader("forget")))["forget"]
    with pytest.raises(UserError, match="max_length: got 60, allowed: at least"):
        Toy(choice_template="instruction", max_length=60).setup("validate")
    equal_options = Splits([QAExample(0, "Who?", "me", ("me", "you"))], examples(10, 4, 2))
    with pytest.raises(UserError, match="distractors: got the true answer among those of example id 0"):
        Toy(equal_options, choice_template="instruction", multiple_choice=False).setup("validate")


def test_scores_say_what_they_need() -> None:
    model, data = AnswerModel(load_model("tiny")), Facts()
    for name in SCORES:
        with pytest.raises(UserError, match=rf"{name}.*every example needs choices \(data.choice_template, and"):
            evaluate(model, data.tokenizer, [data.eval_dataloader("forget")], [name])


# -- scores against references ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught() -> tuple[AnswerModel, Facts]:
    """The tiny model after a few steps on four such prompts, which it then answers: some right and some wrong."""
    data = Facts(choice_template="instruction")
    model = AnswerModel(load_model("tiny"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    (batch,) = data.eval_dataloader("forget", data.splits.forget[:4])
    choices = {name: value[::3] for name, value in batch["forget"]["choices"].items()}
    for _ in range(8):
        answers = model(choices["input_ids"], choices["attention_mask"], choices["labels"])
        (-answers.token_logps.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), data


@pytest.fixture(scope="module")
def expected(taught: tuple[AnswerModel, Facts]) -> dict[str, list[bool]]:
    """Of 11 facts, row by row: options ranked by plain loops, and greedy decoding without a cache."""
    model, data = taught
    found: dict[str, list[bool]] = {name: [] for name in SCORES}
    for example in data.splits.forget[:11]:
        options = [example.answer, *example.distractors]
        listed = data.encoder.choices(example)
        means = []
        for sequence in listed:
            logps = logits(model, sequence.input_ids).log_softmax(-1)
            answer = range(sequence.n_prompt, len(sequence))
            means.append(sum(logps[at - 1, sequence.input_ids[at]].item() for at in answer) / len(answer))
        found["choice_likelihood"].append(means[0] > max(means[1:]))
        ids = listed[0].input_ids[: listed[0].n_prompt]
        limit = max(len(sequence) for sequence in listed) + 16
        while len(ids) < limit and ids[-1] != data.tokenizer.eos_token_id:
            ids = [*ids, int(logits(model, ids)[-1].argmax())]
        text = " ".join(data.tokenizer.decode(ids[listed[0].n_prompt :], skip_special_tokens=True).split())
        found["choice_generation"].append(by_search(text, options) == 0)
    return found


@torch.no_grad()
def logits(model: AnswerModel, ids: list[int]) -> Tensor:
    return model.hf(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("batch_size", [4, 11, 1])
def test_scores_equal_loops_over_uneven_batches(
    taught: tuple[AnswerModel, Facts], expected: dict[str, list[bool]], batch_size: int
) -> None:
    model, data = taught
    some = data.splits.forget[:11]
    data.eval_batch_size = batch_size
    by_hand = {name: 100 * sum(right) / 11 for name, right in expected.items()}
    assert all(0 < value < 100 for value in by_hand.values())
    assert len(set(by_hand.values())) == 2
    found = evaluate(model, data.tokenizer, [data.eval_dataloader("forget", some)], SCORES)["forget"]
    assert found == pytest.approx(by_hand)


def test_two_ranks_and_reset(taught: tuple[AnswerModel, Facts], expected: dict[str, list[bool]]) -> None:
    model, data = taught
    data.eval_batch_size = 4
    scorer, right = Scorer(model, data.tokenizer, SCORES), dict.fromkeys(SCORES, 0.0)
    for rank, share in ((0, 6), (1, 5)):
        scorer.reset()
        ranks = pytest.MonkeyPatch()
        ranks.setattr(data, "_ranks", lambda rank=rank: (2, rank))
        for batch in data.eval_dataloader("forget", data.splits.forget[:11]):
            scorer.update(batch)
        ranks.undo()
        for name, value in scorer.compute()["forget"].items():
            right[name] += value * share / 100
    assert right == pytest.approx({name: sum(values) for name, values in expected.items()})


def test_named_by_themselves_where_the_data_have_choices(taught: tuple[AnswerModel, Facts]) -> None:
    model, data = taught
    part = next(iter(data.eval_dataloader("forget")))["forget"]
    names = Scorer(model, data.tokenizer, None).names(part)
    assert "choice_likelihood" in names
    assert "choice_generation" not in names  # slow
    assert "choice_likelihood" not in Scorer(model, data.tokenizer, None).names(
        {name: value for name, value in part.items() if name != "choices"}
    )


def test_in_bf16(taught: tuple[AnswerModel, Facts]) -> None:
    data = Facts(choice_template="instruction")
    model = AnswerModel(load_model("tiny", torch.bfloat16))
    wide = AnswerModel(load_model("tiny", torch.bfloat16).float())
    some = data.splits.forget[:3]
    found, precise = (
        evaluate(m, data.tokenizer, [data.eval_dataloader("forget", some)], ["choice_likelihood"])["forget"]
        for m in (model, wide)
    )
    assert found == precise  # no two options of these are near each other


# -- runs and attacks ---------------------------------------------------------------------------------------------


def test_a_run_of_the_recipe_stopped_and_attacked_by_it(tmp_path: Path) -> None:
    recipe = RECIPES / "data" / "faithun.yaml"
    released = write_faithun(tmp_path / "FaithUn", 5)
    given = (
        "--data.init_args.path",
        released,
        "--attribution.probe_examples",
        "0",
        "--attribution.every_n_steps",
        "null",
    )
    scores = ("--model.init_args.scores", "[first_token]", "--trainer.max_steps", "2")
    result = fit(tmp_path / "run", "--config", recipe, *given, *scores, "--stopping.threshold", "0")
    assert result.status == 0, result.err
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["score"] == "choice_likelihood"
    assert metrics["after"]["forget_score"] == metrics["after"]["scores"]["forget"]["choice_likelihood"]
    small = attacking(seeds=[0], epochs=1, learning_rates=[1e-4], p=[0.3])
    attacked = ("attack", "--model", tmp_path / "run" / "model", "--output", tmp_path, *small)
    result = command(*attacked, "--score", "choice_generation")
    assert result.status == 0, result.err
    assert "choice_generation" in (tmp_path / "attack.json").read_text(encoding="utf-8")
