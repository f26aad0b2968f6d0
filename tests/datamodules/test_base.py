"""The base data module: loaders, tokenisation, privacy, and every mistake a user can make."""

from __future__ import annotations

import logging
import pickle
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from toys.data import CHAT, Toy, byte_tokenizer, examples

from lightning_ssiuu.datamodules import QAExample, Splits, UnlearningDataModule
from lightning_ssiuu.datamodules.encoding import Encoder
from lightning_ssiuu.datamodules.pairs import answered, batch_of, derangement
from lightning_ssiuu.datamodules.sampling import PairSampler
from lightning_ssiuu.datamodules.splits import name_ids
from lightning_ssiuu.utils.errors import UserError


def attach(data: UnlearningDataModule, rank: int, world_size: int, **extra: object) -> UnlearningDataModule:
    data.trainer = SimpleNamespace(world_size=world_size, global_rank=rank, **extra)
    return data


def ids(batch: dict, part: str) -> list[int]:
    return batch[part]["example_id"].tolist()


def text(encoder: Encoder, tokens: list[int]) -> bytes:
    """Decode the byte tokenizer's tokens by hand."""
    letters = encoder.tokenizer.convert_ids_to_tokens(tokens)
    return b"".join(bytes([32]) if t == "Ġ" else bytes([10]) if t == "Ċ" else t.encode() for t in letters)


# -- loaders ----------------------------------------------------------------------------------------------------


def test_ranks_split_the_batches_of_the_loader() -> None:
    def loaded(rank: int, world_size: int) -> list:
        return list(attach(Toy(batch_size=4), rank, world_size).train_dataloader())

    one, two = loaded(0, 1), [loaded(0, 2), loaded(1, 2)]
    assert len(one) == 2
    for whole, first, second in zip(one, *two, strict=True):
        for part in ("forget", "retain"):
            assert ids(whole, part)[::2] == ids(first, part)
            assert ids(whole, part)[1::2] == ids(second, part)


def test_data_parallel_ranks_count_not_tensor_parallel_ones() -> None:
    data = attach(Toy(batch_size=3), 3, 4, distributed_sampler_kwargs={"num_replicas": 1, "rank": 0})
    assert len(ids(next(iter(data.train_dataloader())), "forget")) == 3


def test_a_batch_larger_than_its_set_is_made_smaller(caplog: pytest.LogCaptureFixture) -> None:
    """A recipe's batch size fits sets of any size: five forget and seven retain examples."""
    with caplog.at_level(logging.INFO):
        data = Toy(batch_size=6, retain_batch_size=8)
        data.setup("fit")
        data.setup("fit")
    told = [f"data.{name}: {n} instead of {m}" for name, n, m in (("batch_size", 5, 6), ("retain_batch_size", 7, 8))]
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == told
    [batch] = data.train_dataloader()
    assert [len(batch[name]["example_id"]) for name in ("forget", "retain")] == [5, 7]
    shared = [attach(Toy(batch_size=8, retain_batch_size=2), rank, 2) for rank in range(2)]
    seen = [one["forget"]["example_id"].tolist() for data in shared for one in data.train_dataloader()]
    assert [len(ids) for ids in seen] == [2] * 4  # 4 of the 5, a multiple of the ranks
    with pytest.raises(UserError, match="forget: got 5 examples, allowed: at least 6"):
        attach(Toy(batch_size=6), 0, 6).setup("fit")


def test_retain_batch_size_and_train_on() -> None:
    batch = next(iter(Toy(retain_batch_size=5).train_dataloader()))
    assert {part: len(ids(batch, part)) for part in batch} == {"forget": 2, "retain": 5}
    assert "options" not in batch["forget"]
    every = list(Toy(train_on="all").train_dataloader())
    assert {tuple(batch) for batch in every} == {("retain",)}
    assert set(chain(*(ids(batch, "retain") for batch in every))) == {*range(5), *range(10, 17)}
    only = Toy(train_on="retain").train_dataloader()
    assert set(chain(*(ids(batch, "retain") for batch in only))) == set(range(10, 17))


def test_workers_change_nothing() -> None:
    here, there = Toy().train_dataloader(), Toy(num_workers=1).train_dataloader()
    for first, second in zip(here, there, strict=True):
        assert ids(first, "forget") == ids(second, "forget")
        assert torch.equal(first["retain"]["labels"], second["retain"]["labels"])


def test_loaders_leave_the_global_random_state_alone() -> None:
    data = Toy()
    data.setup()
    before = torch.get_rng_state()
    list(data.train_dataloader())
    list(data.val_dataloader()[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_loaders_in_order_and_without_an_empty_test_set() -> None:
    assert [list(next(iter(loader))) for loader in Toy().val_dataloader()] == [["forget"], ["retain"], ["test"]]
    data = Toy(Splits(examples(0, 4), examples(10, 4)))
    assert data.eval_splits == ["forget", "retain"]
    assert len(data.test_dataloader()) == 2


def test_evaluating_other_examples() -> None:
    data = Toy()
    batch = next(iter(data.eval_dataloader("test", data.splits.forget[1:3])))
    assert ids(batch, "test") == [1, 2]
    with pytest.raises(UserError, match="split: got 'secret'"):
        data.eval_dataloader("secret")


class Recorder(LightningModule):
    """Keeps the ids it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int]]] = []
        self.evaluated: list[tuple[int, str]] = []

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, ids(batch, "forget")))
        return self.weight**2

    def validation_step(self, batch: dict, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluated.append((dataloader_idx, *batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_lightning_sets_the_epoch(tmp_path: Path) -> None:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    module, data = Recorder(), Toy()
    Trainer(accelerator="cpu", max_epochs=3, default_root_dir=tmp_path, use_distributed_sampler=False, **quiet).fit(
        module, datamodule=data
    )
    sampler = PairSampler({"forget": 5, "retain": 7}, {"forget": 2, "retain": 2}, seed=0)
    expected = [(epoch, sampler.global_batch(epoch, n)["forget"]) for epoch in range(3) for n in range(3)]
    assert module.seen == expected  # the forget ids of Toy are the indices
    assert set(module.evaluated) == {(0, "forget"), (1, "retain"), (2, "test")}


# -- tokenisation -----------------------------------------------------------------------------------------------


def test_plain_template_by_hand() -> None:
    tokenizer = byte_tokenizer()
    part = next(
        iter(
            Toy(
                Splits([QAExample(4, "Who?", "Me"), QAExample(5, "Q", "A")], examples(10, 2)), tokenizer
            ).eval_dataloader("forget")
        )
    )["forget"]
    number = tokenizer.convert_tokens_to_ids

    def spell(written: str) -> list[int]:
        return [number({" ": "Ġ", "\n": "Ċ"}.get(letter, letter)) for letter in written]

    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    prompts = spell("Question: Who?\nAnswer:"), spell("Question: Q\nAnswer:")
    answers = [*spell(" Me"), eos], [*spell(" A"), eos]
    assert part["input_ids"].tolist() == [prompts[0] + answers[0], prompts[1] + answers[1] + [pad] * 4]
    assert part["labels"].tolist() == [[-100] * 22 + answers[0], [-100] * 19 + answers[1] + [-100] * 4]
    assert part["attention_mask"].tolist() == [[1] * 26, [1] * 22 + [0] * 4]
    assert part["example_id"].tolist() == [4, 5]
    assert {tensor.dtype for tensor in part.values()} == {torch.int64}


def test_bos_comes_first_only_where_the_tokenizer_adds_it_and_no_end_token_is_left_inside() -> None:
    for tokenizer, expected in ((byte_tokenizer(), []), (byte_tokenizer(bos=True), [257])):
        sequence = Encoder(tokenizer).sequence("Who?", "Me")
        assert sequence.input_ids[:-26] == expected
        assert sequence.n_prompt == 22 + len(expected)
        assert sequence.input_ids.count(tokenizer.eos_token_id) == 1
        assert sequence.input_ids[-1] == tokenizer.eos_token_id


def test_chat_template() -> None:
    encoder = Encoder(byte_tokenizer(chat=CHAT), "chat")
    sequence = encoder.sequence("Who?", "Me")
    assert text(encoder, sequence.input_ids[: sequence.n_prompt]) == b"<user>Who?<a>"
    assert text(encoder, sequence.input_ids[sequence.n_prompt :]) == b"Me<eos>"


@pytest.mark.parametrize(
    ("template", "prompt", "completion"),
    [
        ("Q:{question} A:", b"Q:Who? A:", b" Me<eos>"),
        ("{question}\n", b"Who?\n", b"Me<eos>"),
        ("Q: {question}\nA: {answer}\n", b"Q: Who?\nA:", b" Me\n"),
        ("{question}\n{answer}", b"Who?", b"\nMe"),
        ('{"q": "{question}", {0}}', b'{"q": "Who?", {0}}', b" Me<eos>"),
    ],
)
def test_own_template(template: str, prompt: bytes, completion: bytes) -> None:
    encoder = Encoder(byte_tokenizer(), template)
    sequence = encoder.sequence("Who?", "Me")
    assert text(encoder, sequence.input_ids[: sequence.n_prompt]) == prompt
    assert text(encoder, sequence.input_ids[sequence.n_prompt :]) == completion


def test_options_true_answer_first() -> None:
    tokenizer = byte_tokenizer()
    pair = [QAExample(0, "Who?", "Me", ("You", "Nobody")), QAExample(1, "Where?", "Here", ("There", "Nowhere"))]
    data = Toy(Splits(pair, examples(10, 2)), tokenizer)
    part = next(iter(data.eval_dataloader("forget")))["forget"]
    options = part["options"]
    assert options["option_of"].tolist() == [0, 0, 0, 1, 1, 1]
    answers = [text(data.encoder, row[row != -100].tolist()) for row in options["labels"]]
    assert answers == [b" Me<eos>", b" You<eos>", b" Nobody<eos>", b" Here<eos>", b" There<eos>", b" Nowhere<eos>"]
    for row, option in ((0, 0), (1, 3)):
        length = int(part["attention_mask"][row].sum())
        assert torch.equal(options["input_ids"][option, :length], part["input_ids"][row, :length])
    assert "options" not in next(iter(data.eval_dataloader("retain")))["retain"]
    data = Toy(Splits(pair, examples(10, 2)), tokenizer, multiple_choice=False)
    assert "options" not in next(iter(data.eval_dataloader("forget")))["forget"]


def test_options_only_where_every_example_has_distractors() -> None:
    mixed = [*examples(0, 1, 2), *examples(1, 1)]
    assert "options" not in next(iter(Toy(Splits(mixed, examples(10, 2))).eval_dataloader("forget")))["forget"]


def test_default_length_respects_the_tokenizer() -> None:
    assert Encoder(byte_tokenizer()).max_length == 256
    assert Encoder(byte_tokenizer(model_max_length=128)).max_length == 128
    assert Encoder(byte_tokenizer(model_max_length=512)).max_length == 256


def test_padding_falls_back_to_eos() -> None:
    assert Encoder(byte_tokenizer(pad_token=None)).pad_token_id == 256


def test_rows_of_prompts_and_answers_and_back() -> None:
    assert batch_of([([5, 6], [9]), ([5], [7])], pad=0)["labels"].tolist() == [[-100, -100, 9], [-100, 7, -100]]
    pairs = [([5, 6], [9]), ([5, 8], []), ([4], [3])]
    assert answered(batch_of(pairs, pad=0)) == pairs


@pytest.mark.parametrize("seed", range(3))
def test_derangement(seed: int) -> None:
    others = derangement(5, seed)
    assert sorted(others) == list(range(5))
    assert all(own != other for own, other in enumerate(others))


# -- mistakes ---------------------------------------------------------------------------------------------------


def test_only_the_first_ids_are_named() -> None:
    assert name_ids(range(5)) == "example ids 0, 1, 2, 3, 4"
    assert name_ids(range(7)) == "example ids 0, 1, 2, 3, 4 and 2 more"


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": -2}, "batch_size"),
        ({"retain_batch_size": 0}, "retain_batch_size"),
        ({"eval_batch_size": 0}, "eval_batch_size"),
        ({"num_workers": -1}, "num_workers"),
        ({"seed": -1}, "seed"),
        ({"train_on": "forget"}, "train_on"),
        ({"template": "fancy"}, "template"),
        ({"template": "chat"}, "template"),
        ({"max_length": 0}, "max_length"),
        ({"max_length": 20}, "max_length"),
        ({"max_length": 200, "tokenizer": byte_tokenizer(model_max_length=100)}, "max_length"),
        ({"tokenizer": byte_tokenizer(eos_token=None)}, "tokenizer"),
    ],
)
def test_bad_arguments(arguments: dict, argument: str) -> None:
    with pytest.raises(UserError) as error:
        Toy(**arguments).setup("fit")
    assert error.value.argument == argument
    assert "SECRET" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("splits", "argument", "told"),
    [
        (Splits([], examples(10, 4)), "forget", "0 examples"),
        (Splits(examples(0, 4), []), "retain", "0 examples"),
        (Splits(examples(0, 4), examples(3, 4)), "example_id", "example ids 3"),
        (Splits(examples(0, 4), examples(10, 4), examples(20, 1), examples(20, 2)), "example_id", "20"),
        (Splits([*examples(0, 3), QAExample(7, "SECRET", " ")], examples(10, 4)), "forget", "example ids 7"),
        (Splits(examples(0, 3), [*examples(10, 2), QAExample(7, "secret  QUESTION 1? ", "x")]), "retain", "1 q.*7"),
        (Splits(examples(0, 3), examples(10, 3), [QAExample(7, "secret question 11?", "x")]), "test", "retain.*7"),
        (Splits([QAExample(7, "SECRET", "SECRET", ("SECRET", "b")), *examples(0, 2, 2)], examples(10, 3)),
         "distractors", "id 7"),
    ],
)  # fmt: skip
def test_bad_sets(splits: Splits, argument: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        Toy(splits).setup("fit")
    assert error.value.argument == argument
    assert "SECRET" not in str(error.value).upper()


def test_too_long_answers_are_named_by_id_and_length() -> None:
    long = QAExample(77, "SECRET", "SECRET" * 50)
    with pytest.raises(UserError, match=r"max_length: got 256.*at least 326.*77 \(326\)") as error:
        Toy(Splits([long, *examples(0, 2)], examples(10, 4))).setup("fit")
    assert "SECRET" not in str(error.value)
    distractor = QAExample(78, "Who?", "SECRET", ("SECRET" * 50,))
    with pytest.raises(UserError, match=r"78"):
        Toy(Splits([distractor, *examples(0, 2, 1)], examples(10, 4))).setup("fit")


def test_mistakes_that_only_several_ranks_show() -> None:
    with pytest.raises(UserError, match="batch_size: got 3, allowed: a multiple of 2"):
        attach(Toy(batch_size=3), 0, 2).setup("fit")
    with pytest.raises(UserError, match="retain_batch_size: got 3, allowed: a multiple of 2"):
        attach(Toy(retain_batch_size=3), 0, 2).setup("fit")
    with pytest.raises(UserError, match=r"trainer\.use_distributed_sampler"):
        attach(Toy(), 0, 2, _accelerator_connector=SimpleNamespace(use_distributed_sampler=True)).setup("fit")
    with pytest.raises(UserError, match="test: got 3 examples, allowed: at least 4"):
        attach(Toy(batch_size=4), 0, 4).val_dataloader()


# -- privacy ----------------------------------------------------------------------------------------------------


def test_no_text_is_shown(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    data = Toy()
    data.setup("fit")
    loader = data.train_dataloader()
    shown = [data, data.splits, data.splits.forget, loader, loader.dataset, loader.dataset["forget", 0], data.encoder]
    printed = " ".join(f"{thing!r} {thing}" for thing in shown) + caplog.text + "".join(capsys.readouterr())
    assert "SECRET" not in printed
    assert "input_ids=[" not in printed  # token ids are text to whoever has the tokenizer
    assert repr(data.splits) == "Splits(forget=5, retain=7, test=3, benign=4)"


def test_digest_follows_the_content() -> None:
    splits = Splits(examples(0, 3), examples(10, 3))
    digest = Toy(splits).content_sha256()
    assert len(digest) == 64
    assert Toy(Splits(examples(0, 3), examples(10, 3)), seed=5).content_sha256() == digest
    assert Toy(Splits(examples(0, 3), examples(10, 4))).content_sha256() != digest
    assert Toy(Splits(examples(0, 3, 1), examples(10, 3))).content_sha256() != digest


def test_examples_survive_pickling() -> None:
    assert pickle.loads(pickle.dumps(examples(0, 2))) == examples(0, 2)
