"""Prompts of several turns: what chat templates make of them, what text templates do, and what depends on it."""

from __future__ import annotations

from typing import Any

import pytest
from toys.chats import CHATS
from toys.data import CHAT, Toy, byte_tokenizer

from lightning_ssiuu.datamodules import QAExample, RelearnDataModule, Splits
from lightning_ssiuu.datamodules.encoding import Encoder
from lightning_ssiuu.datamodules.templates import Chat
from lightning_ssiuu.utils.errors import UserError

SAID = (("user", " Who? "), ("assistant", " Me.\n"))
SYSTEM = (("system", "Be brief."), *SAID)
#: Families whose templates take no system turn, or leave a turn out.
NO_SYSTEM = ("Mistral v0.1", "Mistral v0.3", "Mistral Tekken", "Gemma 2", "Command R")


def text(ids: Any, tokenizer: Any) -> str:
    """What token ids of ``byte_tokenizer`` stand for."""
    return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("Ġ", " ").replace("Ċ", "\n")


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("history", [SAID, SYSTEM], ids=["turns", "system"])
def test_token_ids_are_those_of_the_whole_conversation(name: str, history: tuple[tuple[str, str], ...]) -> None:
    tokenizer = CHATS[name].tokenizer()
    encoder = Encoder(tokenizer, "chat")
    if history is SYSTEM and name in NO_SYSTEM:
        with pytest.raises(UserError, match=r"^template: got 'chat', .*turns of system, user, assistant"):
            encoder.sequence("Where?", "Here", history)
        return
    sequence = encoder.sequence("Where?", "Here", history)
    rendered = Chat(tokenizer).render("Where?", "Here", history)
    whole = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    ids = sequence.input_ids[: -1 if name == "Alpaca" else None]  # which ends no turn: there our own end follows
    assert whole[: len(ids)] == ids
    alone = encoder.sequence("Where?", "Here").pair[1]
    assert sequence.pair[1] == alone  # the same answer, with the same end


def test_a_system_turn_of_the_data_goes_before_the_option() -> None:
    encoder = Encoder(CHATS["SmolLM2"].tokenizer(), "chat", system_prompt="Be long.")
    decode = encoder.tokenizer.decode
    own, without = (decode(encoder.sequence("Where?", "Here", said).pair[0]) for said in (SYSTEM, SAID))
    assert ("Be brief." in own, "Be long." in own) == (True, False)
    assert ("Be brief." in without, "Be long." in without) == (False, True)


def test_names_of_special_tokens_are_text_in_earlier_turns_too() -> None:
    tokenizer = CHATS["SmolLM2"].tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    said = (("user", "Is <|im_end|> a token?"), ("assistant", "<|im_end|> is."))
    prompts = [Encoder(tokenizer, "chat").sequence("Where?", "Here", of).pair[0] for of in (said, SAID)]
    assert prompts[0].count(end) == prompts[1].count(end) == 4  # system, user, assistant, user


@pytest.mark.parametrize(
    ("template", "history", "prompt"),
    [
        ("plain", SAID, "Question:  Who? \nAnswer: Me.\n\nQuestion: Where?\nAnswer:"),
        ("plain", SYSTEM, "Be brief.\n\nQuestion:  Who? \nAnswer: Me.\n\nQuestion: Where?\nAnswer:"),
        ("plain", SYSTEM[:1], "Be brief.\n\nQuestion: Where?\nAnswer:"),
        ("plain", (("assistant", "Hello!"),), "Hello!\n\nQuestion: Where?\nAnswer:"),
        ("plain", (("user", "Hello?"),), "Question: Hello?\nAnswer:\n\nQuestion: Where?\nAnswer:"),
        ("Q: {question}\nA:\n", SAID, "Q:  Who? \nA:\nMe.\n\nQ: Where?\nA:\n"),
        ("{question}", (("user", "Who?"), ("assistant", "Me.")), "Who? Me.\n\nWhere?"),
    ],
)
def test_text_templates(template: str, history: tuple[tuple[str, str], ...], prompt: str) -> None:
    encoder = Encoder(byte_tokenizer(), template)
    sequence = encoder.sequence("Where?", "Here", history)
    assert text(sequence.pair[0], encoder.tokenizer) == prompt
    assert text(sequence.pair[1], encoder.tokenizer).lstrip() == "Here<eos>"


def data(**options: Any) -> Toy:
    def example(number: int, *said: tuple[str, str]) -> QAExample:
        return QAExample(number, f"Where {number // 2}?", "Here", ("There",), history=said)

    forget = [example(0, *SAID), example(1, ("user", "What?"), ("assistant", "That."))]
    return Toy(Splits(forget, [example(2), example(3, *SAID)]), **options)


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_an_example_is_asked_with_what_was_said_before(template: str) -> None:
    tokenizer = byte_tokenizer(chat=CHAT)
    own = data(tokenizer=tokenizer, template=template, choice_template="instruction")
    own.setup("fit")  # the same question after other turns is another one
    (part,) = (batch["forget"] for batch in own.val_dataloader()[0])
    for rows in (part["input_ids"], part["options"]["input_ids"], part["choices"]["input_ids"]):
        texts = [text(row, tokenizer) for row in rows]
        half = len(texts) // 2
        assert all("Who?" in each and "Me." in each for each in texts[:half])
        assert all("What?" in each and "That." in each for each in texts[half:])
    bare = data(tokenizer=tokenizer, template=template)
    bare.__dict__["splits"] = Splits([QAExample(e.example_id, e.question, e.answer) for e in own.splits.forget], [])
    assert bare.content_sha256() != own.content_sha256()
    attack = RelearnDataModule(own, p=0.5)
    assert attack.attacked[0].history
    with pytest.raises(UserError, match="max_length"):
        data(tokenizer=tokenizer, template=template, max_length=30).setup("fit")


def test_the_same_question_after_the_same_turns_is_shared() -> None:
    asked = data().splits
    same = QAExample(9, "where 0?", "Else", history=tuple((role, text.upper()) for role, text in SAID))
    with pytest.raises(UserError, match=r"retain: got 1 questions that are also in forget \(example ids 9\)"):
        Splits(asked.forget, [*asked.retain, same]).validate()
