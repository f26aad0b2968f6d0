"""Every family of tokenizers and chat templates: ids, label masks and scores of a model that answers perfectly."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from toys.chats import CHATS
from toys.data import Toy
from toys.tokenizers import FACTS, FAMILIES, Slow, Taught, tokenizer_of

from lightning_ssiuu.datamodules import QAExample, Splits
from lightning_ssiuu.datamodules.encoding import Collator, Encoder
from lightning_ssiuu.evaluation.predictions import Predictions
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.objectives.rejection import REJECTIONS, rejected

SCORES = ["first_token", "all_tokens", "probability", "rouge_l", "exact_memorization", "extraction_strength"]
ALL_RIGHT = dict.fromkeys(SCORES, pytest.approx(100, abs=1e-4))
TEMPLATES = {
    "plain": ("plain", "Question: {q}\nAnswer:", " {a}"),
    "white space at its end": ("Q: {question} A: ", "Q: {q} A: ", "{a}"),
    "a line for the answer": ("{question}\n", "{q}\n", "{a}"),
    "the question alone": ("{question}", "{q}", " {a}"),
}


def toy(tokenizer: Any, **options: Any) -> Toy:
    examples = [QAExample(n, *fact) for n, fact in enumerate(FACTS[:4])]
    return Toy(Splits(examples[:2], examples[2:]), tokenizer, **options)


def check_scores(data: Toy, taught: list[list[int]]) -> None:
    """A model that was taught these sequences scores 100, and says the answers and not a word more."""
    model, tokenizer = AnswerModel(Taught(taught, len(data.tokenizer))), data.tokenizer
    assert evaluate(model, tokenizer, data.val_dataloader(), SCORES) == {"forget": ALL_RIGHT, "retain": ALL_RIGHT}
    for split, examples in (("forget", data.splits.forget), ("retain", data.splits.retain)):
        answers = [example.answer for example in examples]
        for batch in data.eval_dataloader(split):
            told = Predictions(model, tokenizer, batch[split])
            assert [text.strip() for text in told.references] == answers
            assert told.generations == told.references


def warnings_of(make: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    return [str(one.message) for one in caught]


# -- plain text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_whole_text(family: str, template: str, adds_bos: bool) -> None:
    tokenizer = tokenizer_of(family, adds_bos=adds_bos)
    name, before, after = TEMPLATES[template]
    encoder = Encoder(tokenizer, name)
    for question, answer in FACTS:
        sequence = encoder.sequence(question, answer)
        prompt, completion = before.format(q=question), after.format(a=answer)
        whole = tokenizer(prompt + completion)["input_ids"]
        assert sequence.input_ids == [*whole, tokenizer.eos_token_id]
        # What holds something of the answer is labelled, and before it at most white space.
        text = prompt + completion
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        begins = text.rindex(answer)
        assert offsets[sequence.n_prompt - 1][1] <= begins
        assert text[offsets[sequence.n_prompt][0] : begins].strip() == ""


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_was_taught_the_texts_scores_100(family: str, template: str) -> None:
    tokenizer = tokenizer_of(family, adds_bos=True)
    name, before, after = TEMPLATES[template]
    texts = [before.format(q=question) + after.format(a=answer) for question, answer in FACTS]
    check_scores(
        toy(tokenizer, template=name), [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    )


def test_only_what_gives_back_another_text_is_warned_of() -> None:
    told = {family: warnings_of(lambda family=family: Encoder(tokenizer_of(family))) for family in FAMILIES}
    assert {family for family, lines in told.items() if lines} == set()


def test_a_tokenizer_without_offsets() -> None:
    tokenizer = Slow()
    sequence = Encoder(tokenizer).sequence("Who wrote Emma?", "Jane Austen")
    assert tokenizer.convert_ids_to_tokens(sequence.pair[1]) == [" Jane", " Austen", "</s>"]
    assert sequence.input_ids[:-1] == tokenizer("Question: Who wrote Emma?\nAnswer: Jane Austen")["input_ids"]
    spaced = Encoder(tokenizer, "Q: {question} A: ").sequence("Who wrote Emma?", "Jane Austen")
    assert tokenizer.convert_ids_to_tokens(spaced.pair[1]) == [" Jane", " Austen", "</s>"]


def test_where_a_token_stands_across_prompt_and_answer_the_two_are_tokenised_apart_and_it_is_said_once() -> None:
    tokenizer = tokenizer_of("byte-level BPE", plain=["Answer:=J"])
    encoder: Any = None

    def make() -> None:
        nonlocal encoder
        encoder = Encoder(tokenizer, "{question} Answer:=\n")
        encoder = Encoder(tokenizer, "{question}Answer:")

    assert warnings_of(make) == []
    glued = tokenizer_of("byte-level BPE", plain=["? J"])
    encoder = Encoder(glued, "{question}")

    def use() -> None:
        for _ in range(3):
            sequence = encoder.sequence("Who wrote Emma?", "Jane Austen")
            assert sequence.pair[0] == glued("Who wrote Emma?")["input_ids"]
            assert sequence.pair[1] == [*glued(" Jane Austen")["input_ids"], glued.eos_token_id]

    (line,) = warnings_of(use)
    assert "tokenised apart" in line
    assert "Emma" not in line


# -- chat ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHATS)
def test_a_turn_is_what_the_template_makes_of_it(name: str) -> None:
    chat = CHATS[name]
    tokenizer = chat.tokenizer()
    encoder = Encoder(tokenizer, "chat", template_options=chat.options)
    for question, answer in FACTS[:4]:
        before, after = chat.prompt.format(q=question), chat.completion.format(a=answer)
        whole = tokenizer(before + after, add_special_tokens=False)["input_ids"]
        sequence = encoder.sequence(question, answer)
        assert sequence.input_ids == whole
        assert sequence.pair[1][-1] == tokenizer(after, add_special_tokens=False)["input_ids"][-1]
        said = tokenizer.decode(sequence.pair[1][:-1])
        assert said.strip() == answer
        assert answer not in tokenizer.decode(sequence.pair[0])


@pytest.mark.parametrize("name", CHATS)
def test_a_model_that_was_taught_its_own_template_scores_100(name: str) -> None:
    chat = CHATS[name]
    tokenizer = chat.tokenizer()
    taught = []
    for question, answer in FACTS[:4]:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        # Templates that print the date get it as a variable, or as the text of their clock.
        text = tokenizer.apply_chat_template(turns, tokenize=False, date_string="26 Jul 2024", **chat.options)
        if name == "Granite 3":
            text = chat.prompt.format(q=question) + chat.completion.format(a=answer) + "\n"
        ending = "<|endoftext|>" if name == "Alpaca" else ""
        taught.append(tokenizer(text.rstrip() + ending if ending else text, add_special_tokens=False)["input_ids"])
    check_scores(toy(tokenizer, template="chat", template_options=chat.options), taught)


def test_what_is_warned_of_in_chat_templates() -> None:
    told = {}
    for name, chat in CHATS.items():
        tokenizer = chat.tokenizer()
        told[name] = warnings_of(lambda t=tokenizer, c=chat: Encoder(t, "chat", template_options=c.options))
    assert {name for name, lines in told.items() if lines} == {"DeepSeek R1"}
    (line,) = told["DeepSeek R1"]
    assert "holds more than an answered turn" in line


def test_tiny_s_own_template_says_what_plain_says() -> None:
    from lightning_ssiuu.datamodules import Facts

    plain, chat = Facts(), Facts(template="chat")
    for one, other in zip(plain.splits.forget, chat.splits.forget, strict=True):
        assert (
            plain.encoder.sequence(one.question, one.answer).pair
            == chat.encoder.sequence(other.question, other.answer).pair
        )


@pytest.mark.parametrize("name", ["Llama 2", "Gemma 3", "Mistral v0.3", "Qwen 3", "Phi-3", "Zephyr", "Alpaca"])
def test_a_rejection_is_joined_and_ended_as_the_answer_is(name: str) -> None:
    chat = CHATS[name]
    tokenizer = chat.tokenizer()
    encoder = Encoder(tokenizer, "chat", template_options=chat.options)
    examples = [QAExample(n, *fact) for n, fact in enumerate(FACTS[:4])]
    declining = [QAExample(e.example_id, e.question, REJECTIONS[e.example_id]) for e in examples]

    def part(some: list[QAExample]) -> Any:
        return Collator(encoder.pad_token_id)([("forget", row) for row in encoder.encode(some)])["forget"]

    got, expected = rejected(part(examples), tokenizer), part(declining)
    assert torch.equal(got["input_ids"], expected["input_ids"])
    assert torch.equal(got["labels"], expected["labels"])


# -- names of special tokens in a text ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["Llama 2", "Llama 3", "Mistral v0.3", "Gemma 2", "Qwen 3", "Phi-3", "SmolLM2", "DeepSeek V3"]
)
def test_special_tokens_in_question_and_answer_are_text_and_the_template_s_stay_tokens(name: str) -> None:
    chat = CHATS[name]
    tokenizer = chat.tokenizer()
    names = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    encoder = Encoder(tokenizer, "chat", template_options=chat.options)
    harmless = encoder.sequence("What is it?", "It is that")
    special = tokenizer.convert_tokens_to_ids(names)
    for each in names:
        sequence = encoder.sequence(f"What is {each} it?", f"It is {each} that")
        assert [t for t in sequence.input_ids if t in special] == [t for t in harmless.input_ids if t in special]
        assert sequence.pair[1][-1] == harmless.pair[1][-1]
        assert max(sequence.input_ids) < len(tokenizer)
        said = tokenizer.decode(sequence.pair[1][:-1])
        assert said.strip() == f"It is {each} that"


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_in_plain_text_are_text(family: str) -> None:
    tokenizer = tokenizer_of(family, ["<|endoftext|>", "<eos>"], adds_bos=True)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    for each in ("</s>", "<|endoftext|>", "<eos>"):
        sequence = Encoder(tokenizer).sequence(f"What is {each}?", f"the {each} token")
        assert [t for t in sequence.input_ids if t in special] == [tokenizer.bos_token_id, tokenizer.eos_token_id]
        own = Encoder(tokenizer, f"{each}{{question}}\n").sequence("Who?", "Me")
        assert own.input_ids.count(tokenizer.convert_tokens_to_ids(each)) == 1 + (each == "</s>")


def test_special_tokens_are_text_for_a_tokenizer_without_offsets() -> None:
    chat = "{% for m in messages %}</s>{{ m.content }}{% endfor %}{% if add_generation_prompt %}</s>{% endif %}"
    tokenizer = Slow(chat)
    sequence = Encoder(tokenizer, "chat").sequence("Who is </s>?", "the </s>")
    assert sequence.input_ids.count(tokenizer.eos_token_id) == 3
    assert tokenizer.convert_ids_to_tokens(sequence.pair[1])[-5:] == ["<", "/", "s", ">", "</s>"]


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_answers_are_stripped(template: str) -> None:
    encoder = Encoder(CHATS["Qwen 2.5"].tokenizer(), template)
    assert encoder.sequence("Who?", " \tMe\n ").pair == encoder.sequence("Who?", "Me").pair
