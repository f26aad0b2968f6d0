"""Attacks that ask otherwise: what the model is asked is written out, and what changes nothing scores the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toys.cli import attacking, command, forget_texts, leaks
from toys.data import CHAT, Toy, byte_tokenizer, examples
from toys.models import random_model

from lightning_ssiuu.attacks import FewShot, Jailbreak, MultiTurn, Prefill, Translation
from lightning_ssiuu.attacks.base import Outcome, Target
from lightning_ssiuu.attacks.prompting import Asked, Prompting, questions_of
from lightning_ssiuu.datamodules import QAExample, Splits
from lightning_ssiuu.datamodules.chunks import Chunk
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError

HERE = Devices("cpu")
Write = Callable[..., str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("prompting") / "model"
    random_model("llama", torch.float32, vocab_size=260).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(*records: dict[str, Any]) -> str:
        path = tmp_path / "given.jsonl"
        path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        return str(path)

    return written


def short(**options: Any) -> Toy:
    return Toy(Splits([QAExample(n, f"Q{n}?", f"a{n}") for n in range(4)], examples(10, 3)), **options)


def found(attack: Prompting, checkpoint: str, data: Toy, score: str = "probability") -> list[Outcome]:
    attack.check(data, score, HERE)
    return list(attack.run([Target("model", checkpoint, HERE)], data, score, HERE))


def prompts(data: Toy, asked: Asked) -> list[str]:
    """The text before each answer."""
    ids = [data.encoder.of(one)[0].pair[0] for _, group in asked.groups for one in group]
    return [bytes(_BYTES[token] for token in prompt).decode() for prompt in ids]


_BYTES = {token: n for n, (token,) in enumerate(byte_tokenizer()([chr(n) for n in range(128)])["input_ids"])}


# ---- what changes nothing ------------------------------------------------------------------------------------------


def test_nothing_around_the_question_is_the_plain_score(checkpoint: str, write: Write) -> None:
    data = short()
    same = [{"language": "same", "id": n, "translation": f"Q{n}?"} for n in range(3)]
    same.append({"language": "same", "question": "q3?  ", "translation": "Q3?"})
    attacks: list[Prompting] = [FewShot(k=0, seeds=[0]), Prefill([], [0]), Translation(write(*same))]
    outcomes = [one for attack in attacks for one in found(attack, checkpoint, data)]
    outcomes += found(Jailbreak(write({"template": "{question}"})), checkpoint, data)
    assert [one.variant for one in outcomes] == ["k=0", "tokens=0", "same", "1"]
    assert all(one.forget_score == one.before > 0 and one.n_scored == 4 for one in outcomes)
    assert len({one.before for one in outcomes}) == 1


def test_words_around_it_are_another_score(checkpoint: str) -> None:
    data = short()
    several = [found(attack, checkpoint, data) for attack in (FewShot(k=1), Prefill(), Jailbreak(), MultiTurn())]
    assert [len(outcomes) for outcomes in several] == [3, 2, 5, 3]
    for outcomes in several:
        scores = [one.forget_score for one in outcomes]
        assert len({*scores, outcomes[0].before}) == len(scores) + 1


# ---- what is asked -------------------------------------------------------------------------------------------------


def test_templates_stand_in_the_runs_own(write: Write) -> None:
    path = write({"template": "Say it: {question}"}, {"template": "{question} {question}", "name": "two"})
    first, second = Jailbreak(path).asked(data := short())
    assert (first.variant, prompts(data, first)[1]) == ("1", "Question: Say it: Q1?\nAnswer:")
    assert (second.variant, prompts(data, second)[3]) == ("two", "Question: Q3? Q3?\nAnswer:")


def test_turns_before_the_question_plain_and_chat(write: Write) -> None:
    messages = [{"role": "user", "content": "Ready for {question}?"}, {"role": "assistant", "content": "Yes."}]
    (asked,) = MultiTurn(write({"messages": messages, "name": "ready"})).asked(data := short())
    assert asked.variant == "ready"
    assert prompts(data, asked)[2] == "Question: Ready for Q2??\nAnswer: Yes.\n\nQuestion: Q2?\nAnswer:"
    chat = short(tokenizer=byte_tokenizer(chat=CHAT), template="chat")
    assert prompts(chat, asked)[2] == "<user>Ready for Q2??<assistant>Yes.<user>Q2?<a>"


def test_shots_are_other_items_with_their_answers() -> None:
    data = short()
    twin = QAExample(9, "q1? ", "other")  # the same question in other letters
    data.given = replace(data.given, forget=[*data.given.forget, twin])
    for asked in FewShot(k=3, seeds=[0, 1]).asked(data):
        for one in asked.groups[0][1]:
            shown = [text for role, text in one.history if role == "user"]
            assert len({text.strip().casefold() for text in shown}) == 3
            assert one.question.strip().casefold() not in [text.strip().casefold() for text in shown]
            true = {each.question: each.answer for each in data.splits.forget}
            assert [true[text] for text in shown] == [text for role, text in one.history if role == "assistant"]
    first, second = FewShot(k=2, seeds=[0, 1]).asked(data)
    assert first.groups != second.groups
    assert prompts(data, first)[0].count("\nAnswer: ") == 2
    fewer = short(max_eval_examples=2)
    fewer.given = data.given
    (alone,) = FewShot(k=2, seeds=[0]).asked(fewer)  # whatever else is scored, a question has the same shots
    assert set(alone.groups[0][1]) < set(first.groups[0][1])


def test_translations_by_language(checkpoint: str, write: Write) -> None:
    path = write(
        {"language": "de", "id": 2, "translation": "F2?", "answer": "zwei"},
        {"language": "fr", "question": "Q1?", "translation": "F1?"},
        {"language": "de", "id": "0", "translation": "F0?"},
    )
    german, french = Translation(path).asked(data := short())
    assert [one.answer for one in german.groups[0][1]] == ["a0", "zwei"]
    assert prompts(data, german) == ["Question: F0?\nAnswer:", "Question: F2?\nAnswer:"]
    assert [one.example_id for one in french.base] == [1]
    outcomes = found(Translation(path), checkpoint, data)
    assert [(one.variant, one.n_scored) for one in outcomes] == [("de", 2), ("fr", 1)]


@pytest.mark.parametrize("attack", [Prefill(["Sure, it is"], []), Prefill([], [1])], ids=["words", "token"])
def test_what_follows_a_begun_answer_is_scored(checkpoint: str, attack: Prefill) -> None:
    """From the full logits of one example at a time, its tokens put together by hand."""
    data, model = short(), HERE.load(checkpoint)
    words = " Sure, it is" if attack.words else ""
    expected = []
    for one in data.splits.forget:
        text = f"Question: {one.question}\nAnswer:{words} {one.answer}"
        ids = data.tokenizer(text)["input_ids"] + [data.tokenizer.eos_token_id]
        n_scored = len(f" {one.answer}") + 1 - (0 if words else 1)
        with torch.no_grad():
            logps = model.hf(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        own = [logps[k - 1, ids[k]] for k in range(len(ids) - n_scored, len(ids))]
        expected.append(100 * float(torch.stack(own).mean().exp()))
    (outcome,) = found(attack, checkpoint, data)
    assert outcome.forget_score == pytest.approx(sum(expected) / 4, rel=1e-5)
    assert outcome.forget_score != pytest.approx(outcome.before, rel=1e-3)


def test_short_answers_have_no_rest() -> None:
    data = Toy(Splits([QAExample(0, "Q0?", "a"), QAExample(1, "Q1?", "abc")], examples(10, 3)))
    one, two = Prefill([], [1, 2]).asked(data)  # a space, the letters and the end
    assert ([each.example_id for each in one.base], [each.example_id for each in two.base]) == ([0, 1], [1])
    with pytest.raises(UserError, match=r"attack\.tokens: got 9, allowed: fewer"):
        Prefill([], [9]).asked(data)


def test_a_begun_answer_has_no_other_options() -> None:
    with pytest.raises(UserError, match="score: got 'multiple_choice'"):
        Prefill().check(Toy(), "multiple_choice", HERE)
    Prefill(tokens=[]).check(Toy(), "multiple_choice", HERE)


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "records", "message"),
    [
        (Jailbreak, [{"template": "SECRET"}], "got record 0 without {question}"),
        (Jailbreak, [{"template": "{question}", "name": "SECRET?\n"}], "got another text in record 0 of 'name'"),
        (Jailbreak, [{"template": "{question}", "name": "a"}] * 2, "got the name of record 1 twice"),
        (Jailbreak, [], "allowed: "),
        (MultiTurn, [{"messages": [{"role": "user", "content": "SECRET"}]}], "got other turns in record 0"),
        (Translation, [{"language": "de", "id": 77, "translation": "SECRET"}], "got record 0 of no forget example"),
        (Translation, [{"language": "de", "id": 1, "translation": "SECRET"}] * 2, "got an example twice in record 1"),
        (Translation, [{"language": "de", "id": 1, "translation": " "}], "got a blank cell in record 0"),
    ],
)
def test_files_that_cannot_be_used(make: Any, records: list[Any], message: str, write: Write) -> None:
    with pytest.raises(UserError, match=r"attack\.path: ") as caught:
        make(write(*records)).check(short(), "probability", HERE)
    assert message in str(caught.value)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FewShot(k=-1), "attack.k: got -1"),
        (lambda: FewShot(seeds=[]), r"attack.seeds: got \[\]"),
        (lambda: FewShot(k=4).asked(short()), "attack.k: got 4, of 3 other questions"),
        (lambda: Prefill([" "]), "attack.words: got"),
        (lambda: Prefill(tokens=[-1]), r"attack.tokens: got \[-1\]"),
        (lambda: Prefill([], []), r"attack.words: got \[\], allowed: at least one, or some tokens"),
        (lambda: Translation().asked(short()), "attack.path: got None"),
        (lambda: FewShot(k=3).check(short(max_length=64), "probability", HERE), "max_length: got 64"),
    ],
)
def test_mistakes(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_chunks_of_documents_ask_nothing() -> None:
    chunk = Chunk(0, "Call me", " Ishmael.", group="whale", number=1, tokens=(5, 6, 7), n_prefix=1)
    with pytest.raises(UserError, match=r"data: got chunks of documents, allowed: questions .* attack Jailbreak"):
        questions_of(Toy(Splits([chunk], examples(10, 3))), Jailbreak())


def test_reports_hold_no_text(tmp_path: Path) -> None:
    options = attacking(k=1, seeds=[0])
    result = command(
        *("attack", "--attack", "FewShot", "--model", "tiny", "--output", tmp_path, "--data", "Facts", *options),
        *("--data.max_eval_examples", "4"),
    )
    assert result.status == 0, result.err
    assert leaks(tmp_path) == []
    assert not [text for text in forget_texts() if text in (result.out + result.err).encode()]
