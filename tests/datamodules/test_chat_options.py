"""System prompt, variables and date of a chat template: passed on, kept with a run, refused where they mean nothing."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toys.chats import CHATS
from toys.cli import SHORT, fit, read_json
from toys.data import Toy
from toys.tokenizers import FACTS, tokenizer_of
from transformers.utils import chat_template_utils

from lightning_ssiuu.datamodules import Facts, QAExample, RelearnDataModule, Splits
from lightning_ssiuu.datamodules.encoding import Encoder
from lightning_ssiuu.datamodules.templates import Chat
from lightning_ssiuu.evaluation.runs import run_data
from lightning_ssiuu.evaluation.utility import encoding_like
from lightning_ssiuu.training.reference import reference_key
from lightning_ssiuu.utils.errors import UserError

CLOCKS = ("Llama 3.2", "Granite 3")


def asked(name: str, **options: Any) -> str:
    tokenizer = CHATS[name].tokenizer()
    sequence = Encoder(tokenizer, "chat", **options).sequence("Who?", "Me")
    return tokenizer.decode(sequence.pair[0])


def toy(name: str, **options: Any) -> Toy:
    examples = [QAExample(n, *fact, paraphrases=("Who else?",)) for n, fact in enumerate(FACTS[:4])]
    return Toy(Splits(examples[:2], examples[2:]), CHATS[name].tokenizer(), template="chat", **options)


@pytest.fixture
def another_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is 2031 for the library."""

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2031, 12, 24, 5, 6, 7)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    chat_template_utils._compile_jinja_template.cache_clear()


@pytest.mark.parametrize("name", CLOCKS)
def test_prompts_stay_the_same_from_day_to_day(name: str, another_day: None) -> None:
    chat = CHATS[name]
    assert "2031" in chat.tokenizer().apply_chat_template([{"role": "user", "content": "Who?"}], tokenize=False)
    assert asked(name) == chat.prompt.format(q="Who?")


@pytest.mark.parametrize("name", CLOCKS)
def test_a_tokenizer_for_libraries_that_render_themselves(name: str, another_day: None) -> None:
    chat = CHATS[name]
    tokenizer = chat.tokenizer()
    turns = [{"role": "user", "content": "Who?"}]
    dated = Chat(tokenizer).dated()
    assert dated.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == chat.prompt.format(q="Who?")
    assert tokenizer.chat_template == chat.template


def test_the_date_is_an_option() -> None:
    assert "Today Date: 02 Jan 2026\n" in asked("Llama 3.2", date="2026-01-02")
    assert "Today's Date: January 02, 2026." in asked("Granite 3", date="2026-01-02")
    assert "Today Date: any day\n" in asked("Llama 3.2", template_options={"date_string": "any day"})


@pytest.mark.parametrize("options", [{"date": "2026-01-02"}, {"template_options": {"date_string": "any day"}}])
def test_what_a_model_sees_is_what_digest_and_stored_values_are_of(options: dict[str, Any]) -> None:
    model = torch.nn.Linear(1, 1)

    def seen(**given: Any) -> tuple[str, str]:
        data = toy("Llama 3.2", **given)
        parts = [batch["forget"] for batch in data.eval_dataloader("forget")]
        return data.content_sha256(), reference_key(model, ["logps"], {"forget": parts})

    first, again, other = (seen(**given) for given in ({}, {}, options))
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


def test_a_digest_is_of_every_wording_and_every_answer() -> None:
    base = QAExample(0, "Who?", "Me", ("You",), ("Which one?",))
    others = [QAExample(1, "Where?", "Here")]
    variants = [
        base,
        QAExample(0, "Who? ", "Me", ("You",), ("Which one?",)),
        QAExample(0, "Who?", "I", ("You",), ("Which one?",)),
        QAExample(0, "Who?", "Me", ("They",), ("Which one?",)),
        QAExample(0, "Who?", "Me", ("You",), ("Which of them?",)),
        QAExample(2, "Who?", "Me", ("You",), ("Which one?",)),
    ]
    digests = [Toy(Splits([variant], others)).content_sha256() for variant in variants]
    assert len(set(digests)) == len(variants)
    assert (
        Toy(Splits([QAExample(0, "Who?", " Me\n", ("You ",), ("Which one?",))], others)).content_sha256() == digests[0]
    )


def test_the_system_prompt() -> None:
    assert asked("Qwen 2.5", system_prompt="Be brief.").startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert "<<SYS>>\nBe brief.\n<</SYS>>\n\nWho? [/INST]" in asked("Llama 2", system_prompt="Be brief.")
    assert asked("Gemma 3", system_prompt="Be brief.").startswith(
        "<bos><start_of_turn>user\nBe brief.\n\nWho?<end_of_turn>"
    )


@pytest.mark.parametrize(
    ("name", "options", "argument", "said"),
    [
        ("Gemma 2", {"system_prompt": "Be brief."}, "system_prompt", "System role not supported"),
        ("Qwen 2.5", {"template": "plain", "system_prompt": "Be brief."}, "system_prompt", "template chat"),
        ("Qwen 3", {"template": "plain", "template_options": {"enable_thinking": False}}, "template_options", "chat"),
        ("Qwen 3", {"template_options": {"messages": []}}, "template_options", "set by the package"),
        ("Qwen 3", {"template_options": {"add_generation_prompt": True}}, "template_options", "set by the package"),
        ("Llama 3.2", {"template_options": {"date_string": 3}}, "template_options", "the chat template said"),
        ("Qwen 3", {"template_options": {"not a name": 1}}, "template_options", "names of variables"),
        ("Llama 3.2", {"date": "tomorrow"}, "date", "YYYY-MM-DD"),
        ("Llama 3.2", {"date": "2026-02-30"}, "date", "YYYY-MM-DD"),
    ],
)
def test_refused_in_one_line(name: str, options: dict[str, Any], argument: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        Encoder(CHATS[name].tokenizer(), **{"template": "chat"} | options)
    assert error.value.argument == argument
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('not\ntoday') }}",
        "{% for m in messages %}{{ m.content.nothing.at_all }}{% endfor %}",
        "{% for m in messages %}{{ m.role }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content",
    ],
)
def test_a_template_that_does_not_write_what_is_said_is_refused(template: str) -> None:
    with pytest.raises(UserError, match=r"^template: got 'chat', allowed: plain or a format string") as error:
        Encoder(tokenizer_of("byte-level BPE", chat=template), "chat")
    assert "\n" not in str(error.value)


def test_a_template_that_marks_what_the_model_says_without_an_end() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }}\n{% else %}A:\n"
        "{% generation %}{{ m.content }}!{% endgeneration %} ...{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    tokenizer = tokenizer_of("byte-level BPE", chat=template)
    prompt, completion = Encoder(tokenizer, "chat").sequence("Who?", "Me").pair
    assert tokenizer.decode(prompt).endswith("A:\n")
    assert tokenizer.decode(completion) == "Me!</s>"


def test_other_data_modules_of_a_run_ask_alike() -> None:
    options = {"system_prompt": "Be brief.", "template_options": {"any": 1}, "date": "2026-01-02"}
    source = Facts(template="chat", **options)
    relearning, suite = RelearnDataModule(source, p=0.5), encoding_like("embedded", source, 4)
    example = source.splits.forget[0]
    for data in (relearning, suite):
        assert data.encoding == source.encoding
        own, other = (one.encoder.sequence(example.question, example.answer).pair for one in (data, source))
        assert own == other
    assert "Be brief." in source.tokenizer.decode(other[0])


def test_a_run_keeps_them_and_judges_by_them(tmp_path: Path) -> None:
    options = {"template": "chat", "system_prompt": "Be brief.", "date": "2026-01-02"}
    given = [word for name, value in options.items() for word in (f"--data.init_args.{name}", value)]
    done = fit(tmp_path / "run", *SHORT, *given, "--data.init_args.template_options.enable_thinking", "false")
    assert done.status == 0, done.err
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["init_args"]
    assert {name: kept[name] for name in options} == options
    assert kept["template_options"] == {"enable_thinking": False}
    data = run_data(str(tmp_path / "run" / "model"), None)
    assert data.encoding | {"max_length": None} == options | {
        "max_length": None,
        "template_options": {"enable_thinking": False},
    }
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["provenance"]["data_sha256"] == data.content_sha256() != Facts().content_sha256()


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("system_prompt", "Be brief.", "system_prompt: got 'Be brief.', allowed: null, or"),
        ("date", "tomorrow", "date: got 'tomorrow', allowed: a day as YYYY-MM-DD"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path: Path, option: str, value: str, told: str) -> None:
    done = fit(tmp_path / "run", *SHORT, f"--data.init_args.{option}", value)
    assert done.status == 2
    assert f"error: {told}" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()
