"""Documents: how text is cut, what is trained and scored, and that no attack trains on text that is scored."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys.data import Toy, byte_tokenizer

from lightning_ssiuu.datamodules import Documents, QAExample, RelearnDataModule, Splits
from lightning_ssiuu.datamodules.chunks import Chunk, Span, divided, exchanged, sharing, spans_of
from lightning_ssiuu.datamodules.deletion import IdNames
from lightning_ssiuu.datamodules.invented import control_of
from lightning_ssiuu.datamodules.pairs import PREFIX, answered, asked
from lightning_ssiuu.utils.errors import UserError

BOS, EOS = byte_tokenizer().convert_tokens_to_ids(["<bos>", "<eos>"])
WORDS = ("river", "mill", "winter", "orchard", "bell", "ferry", "candle", "harbour", "barley", "letter")


def text_of(name: str, n_characters: int) -> str:
    """As many characters, no passage of which stands in a text of another name."""
    words = (f"{WORDS[n * n % 10]}-{name}{n}" for n in range(n_characters))
    return "SECRET " + " ".join(words)[: n_characters - 7]


def folder_of(path: Path, **sizes: int) -> str:
    path.mkdir()
    for name, size in sizes.items():
        (path / f"{name}.txt").write_text(text_of(name, size), encoding="utf-8")
    return str(path)


def documents(tmp_path: Path, bos: bool = False, **options: Any) -> Documents:
    forget = folder_of(tmp_path / "forget", a=100, b=85, c=40, d=17)
    retain = folder_of(tmp_path / "retain", e=90, f=60)
    settings: dict[str, Any] = {"chunk_tokens": 20, "prefix_tokens": 8, "tokenizer": byte_tokenizer(bos)} | options
    return Documents(forget, retain, **settings)


def chunks_of(examples: Sequence[QAExample]) -> list[Chunk]:
    assert all(isinstance(example, Chunk) for example in examples)
    return [example for example in examples if isinstance(example, Chunk)]


def places(chunks: Sequence[QAExample]) -> set[tuple[int, int]]:
    """Every token of every chunk, by its document and place."""
    spans = (span for chunk in chunks_of(chunks) for span in chunk.spans)
    return {(span.document, place) for span in spans for place in range(span.start, span.stop)}


@pytest.mark.parametrize("chunk", [2, 7, 20])
@pytest.mark.parametrize("n_tokens", [0, 1, 6, 20, 21, 59, 60, 61])
def test_every_token_is_in_a_chunk(n_tokens: int, chunk: int) -> None:
    for stride in {1, chunk // 2 + 1, chunk}:
        spans = spans_of(3, n_tokens, chunk, stride)
        assert {place for span in spans for place in range(span.start, span.stop)} == set(range(n_tokens))
        assert all(span.stop - span.start == min(chunk, n_tokens) for span in spans)
        assert [span.start for span in spans] == sorted({span.start for span in spans})


@pytest.mark.parametrize("bos", [False, True])
def test_trained_on_all_tokens_and_scored_on_the_continuation(tmp_path: Path, bos: bool) -> None:
    data = documents(tmp_path, bos, batch_size=3)
    lead, byte = [BOS] * bos, data.tokenizer
    first = byte(text_of("a", 100), add_special_tokens=False)["input_ids"]
    names = [chunk.name for chunk in chunks_of(data.splits.forget)]
    assert names[:6] == [*(f"a.txt#{n}" for n in range(1, 6)), "b.txt#1"]
    scored = next(iter(data.eval_dataloader("forget")))["forget"]
    assert answered(scored)[:2] == [([*lead, *first[:8]], first[8:20]), ([*lead, *first[20:28]], first[28:40])]
    assert scored[PREFIX].unique().tolist() == [6 + bos, 8 + bos]  # d has 17 tokens: the same share
    seen = {}
    for batch in data.train_dataloader():
        for part in batch.values():
            ids = part["example_id"].tolist()
            for example, pair, two in zip(ids, answered(part), asked(part), strict=True):
                if pair[1]:
                    seen[example] = pair, two
    for chunk in chunks_of(data.splits.forget):
        tokens = [*lead, *chunk.tokens]
        pair, two = seen[chunk.example_id]
        assert pair == (tokens[:1], tokens[1:])  # nothing precedes the first token
        assert two == (tokens[: bos + chunk.n_prefix], tokens[bos + chunk.n_prefix :])
        assert EOS not in tokens


def test_a_short_document_is_one_chunk_and_a_blank_one_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"id": f"c-{n}", "text": text} for n, text in enumerate(("abcdefghij", "", "x", "no"))]
    (tmp_path / "forget.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    folder_of(tmp_path / "retain", e=30)
    options: dict[str, Any] = {"chunk_tokens": 20, "prefix_tokens": 8, "tokenizer": byte_tokenizer()}
    with caplog.at_level(logging.INFO):
        forget = chunks_of(Documents(str(tmp_path / "forget.jsonl"), str(tmp_path / "retain"), **options).splits.forget)
    assert [(chunk.name, len(chunk.tokens), chunk.n_prefix) for chunk in forget] == [("c-0#1", 10, 4), ("c-3#1", 2, 1)]
    assert "data.forget: left out 2 chunks or documents that are blank" in caplog.text


def test_chunks_of_white_space_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "forget.txt").write_text("the old mill" + 40 * " \n" + "by the river", encoding="utf-8")
    folder_of(tmp_path / "retain", e=90)
    data = Documents(str(tmp_path / "forget.txt"), str(tmp_path / "retain"), chunk_tokens=12, prefix_tokens=6)
    tokens = data.tokenizer("the old mill" + 40 * " \n" + "by the river")["input_ids"]
    kept = chunks_of(data.splits.forget)
    assert len(kept) < len(spans_of(0, len(tokens), 12, 12))
    assert all(chunk.question.strip() and chunk.answer.strip() for chunk in kept)


def test_sources(tmp_path: Path) -> None:
    nested = tmp_path / "folder" / "part"
    nested.mkdir(parents=True)
    (nested / "two.md").write_text("of the other place", encoding="utf-8")
    (tmp_path / "folder" / "one.txt").write_text("of the place", encoding="utf-8")
    (tmp_path / "folder" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "rows.csv").write_text("body,title\nof a row,first\nof no row,second\n", encoding="utf-8")
    data = Documents(
        str(tmp_path / "folder"),
        str(tmp_path / "rows.csv"),
        test=str(nested / "two.md"),
        text_column="body",
        name_column="title",
        tokenizer=byte_tokenizer(),
    )
    names = {name: [chunk.name for chunk in chunks_of(examples)] for name, examples in data.splits.items()}
    assert names["forget"] == ["one.txt#1", "part/two.md#1"]
    assert names["retain"] == ["first#1", "second#1"]
    assert names["test"] == []  # two.md is in the forget set
    sources = str(tmp_path / "rows.csv"), str(tmp_path / "folder")
    unnamed = Documents(*sources, text_column="body", tokenizer=byte_tokenizer())
    assert [chunk.name for chunk in chunks_of(unnamed.splits.forget)] == ["1#1", "2#1"]
    assert len({e.example_id for _, examples in unnamed.splits.items() for e in examples}) == 4


def passages(path: Path, name: str = "customer_id") -> str:
    """A table of five texts of one to three chunks, the last without an id."""
    rows = [{name: number or None, "text": text_of(f"t{number}", 25 * number + 15)} for number in (1, 2, 1, 3, 0)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_one_table_and_what_of_it_to_forget(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"chunk_tokens": 20, "prefix_tokens": 8, "tokenizer": byte_tokenizer()}
    table, ids = passages(tmp_path / "passages.jsonl"), tmp_path / "ids.txt"
    ids.write_text("1\n3\n", encoding="utf-8")
    with caplog.at_level(logging.INFO):
        data = Documents(data=table, forget_ids=str(ids), **options)
        names = [chunk.name for chunk in chunks_of(data.splits.forget)]
    assert names == ["1#1", "1#2", "1#1", "1#2", *(f"3#{n}" for n in range(1, 6))]
    assert {chunk.source_id for chunk in chunks_of(data.splits.forget)} == {"1", "3"}
    assert {chunk.group for chunk in chunks_of(data.splits.retain)} == {"2", "5"}
    assert "data: 1 of 5 rows have no id; they are in the retain set" in caplog.text
    where = Documents(data=table, forget_where="customer_id in (1, 3)", **options)
    assert where.content_sha256() == data.content_sha256()
    (tmp_path / "key").write_text("0123456789abcdef", encoding="utf-8")
    hashed = Documents(data=table, forget_ids=[1, 3], ids="hashed", id_key=str(tmp_path / "key"), **options)
    assert [chunk.group for chunk in chunks_of(hashed.splits.forget)] == [
        IdNames(b"0123456789abcdef")(name) for name in ["1"] * 4 + ["3"] * 5
    ]
    assert hashed.content_sha256() == data.content_sha256()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forget_ids": [1, 8, 9]}, r"forget_ids: got 2 ids \(8, 9\), allowed: ids that rows of the table have"),
        ({"forget_ids": [1, 2, 3], "forget_where": "customer_id == 1"}, "forget_ids, forget_where: got "),
        ({"forget_where": "customer_id > 7"}, "forget_where: got no row of 5, allowed: some rows to forget and some"),
        ({"forget_ids": [1], "name_column": "name"}, "name_column: got no column called 'id', .*customer_id, text"),
        ({"forget_ids": [1], "text_column": "body"}, "text_column: got 'body', allowed: customer_id, text"),
        ({"forget_ids": [1], "forget": "a.txt"}, "forget: got 'a.txt', allowed: null, beside a table"),
        ({"forget_ids": [1], "ids": "hashed"}, "id_key: got None, allowed: a file with a secret"),
        ({"data": None, "forget_ids": [1]}, r"forget_ids: got \[1\], allowed: null, or a table"),
        ({"data": None}, "forget, retain: got nothing, allowed: a file or hub data set for each; or one table"),
    ],
)
def test_mistakes_about_a_table(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    given = {"data": passages(tmp_path / "passages.jsonl"), "tokenizer": byte_tokenizer()}
    with pytest.raises(UserError, match=message) as error:
        _ = Documents(**(given | options)).splits
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_tokens": 1}, "chunk_tokens: got 1, allowed: "),
        ({"prefix_tokens": 20}, "prefix_tokens: got 20, allowed: 1 to 19, less than chunk_tokens"),
        ({"stride": 21}, "stride: got 21, allowed: null, or 1 to 20"),
        (
            {"forget": "nowhere"},
            r"forget: got 'nowhere', allowed: an existing \.txt or \.md file, a folder of them, or ",
        ),
        ({"forget": "nowhere.txt"}, r"forget: got 'nowhere\.txt', allowed: an existing \.txt or \.md file"),
        ({"max_length": 12}, r"chunk_tokens: got 20, allowed: at most 12, what the model takes"),
        ({"tokenizer": "tiny", "chunk_tokens": 129}, r"chunk_tokens: got 129, allowed: at most 128"),
    ],
)
def test_mistakes(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    given = {"forget": folder_of(tmp_path / "forget", a=150), "retain": folder_of(tmp_path / "retain", e=50)}
    settings: dict[str, Any] = {"chunk_tokens": 20, "prefix_tokens": 8, "tokenizer": byte_tokenizer()}
    with pytest.raises(UserError, match=message) as error:
        _ = Documents(**(given | settings | options)).splits
    assert "SECRET" not in str(error.value)


def test_long_documents_do_not_fail_for_their_length(tmp_path: Path) -> None:
    forget, retain = folder_of(tmp_path / "forget", a=30_000), folder_of(tmp_path / "retain", e=3_000)
    data = Documents(forget, retain, chunk_tokens=1000, prefix_tokens=500, tokenizer=byte_tokenizer())
    data.setup("fit")
    assert len(data.splits.forget) == 30
    assert data.encoder.max_length == 1001


def test_names_of_special_tokens_are_text(tmp_path: Path) -> None:
    (tmp_path / "forget.txt").write_text("say <eos> and <bos>", encoding="utf-8")
    folder_of(tmp_path / "retain", e=50)
    data = Documents(str(tmp_path / "forget.txt"), str(tmp_path / "retain"), tokenizer=byte_tokenizer())
    (chunk,) = chunks_of(data.splits.forget)
    assert len(chunk.tokens) == len("say <eos> and <bos>")
    assert not {BOS, EOS} & set(chunk.tokens)


@pytest.mark.parametrize("stride", [20, 7])
@pytest.mark.parametrize("p", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("sizes", [{"a": 400}, {"a": 100, "b": 85, "c": 140}, {f"n{n}": 30 for n in range(9)}])
def test_nothing_that_is_scored_is_attacked(tmp_path: Path, stride: int, p: float, sizes: dict[str, int]) -> None:
    forget, retain = folder_of(tmp_path / "forget", **sizes), folder_of(tmp_path / "retain", e=90)
    options: dict[str, Any] = {"chunk_tokens": 20, "prefix_tokens": 8, "stride": stride, "tokenizer": byte_tokenizer()}
    source = Documents(forget, retain, **options)
    control = control_of(source)
    assert control is not None
    assert control.kind == "chunks with each other's continuations"
    chosen = set()
    for data in (source, control.data):
        for seed in range(8):
            cell = RelearnDataModule(data, p=p, seed=seed)
            attacked, scored = chunks_of(cell.attacked), chunks_of(cell.scored)
            assert not places(attacked) & places(scored)
            assert len(attacked) == round(p * len(data.splits.forget))
            if data is source:
                documents = {chunk.group for chunk in attacked} & {chunk.group for chunk in scored}
                assert not documents or len({chunk.group for chunk in attacked}) == len(sizes)  # none is left whole
                chosen.add(tuple(chunk.name for chunk in attacked))
    assert len(chosen) > 2


def test_a_selection_that_would_score_what_it_teaches_is_refused(tmp_path: Path) -> None:
    data = documents(tmp_path, stride=7)

    def alternating(forget: Sequence[QAExample], *_: object) -> tuple[list[QAExample], list[QAExample]]:
        return list(forget[::2]), list(forget[1::2])

    with pytest.raises(
        UserError, match=r"scored: got \d+ chunks that share text with attacked ones \(a\.txt#2"
    ) as error:
        _ = RelearnDataModule(data, "mine", None, selection=alternating).splits
    assert "SECRET" not in str(error.value)


def test_exchanged_continuations_are_never_the_own_ones(tmp_path: Path) -> None:
    data = documents(tmp_path, stride=7)
    forget = chunks_of(data.splits.forget)
    given = list(exchanged(forget))
    assert len(given) == len(forget) - 1  # d, the only document of a single chunk, has no partner
    own = {chunk.example_id: chunk for chunk in forget}
    for chunk in given:
        before = own[chunk.example_id]
        assert chunk.tokens[: chunk.n_prefix] == before.tokens[: before.n_prefix]
        assert chunk.answer != before.answer
        assert chunk.answer in {other.answer for other in forget}
    answers = sorted(chunk.answer for chunk in given)
    assert answers == sorted(chunk.answer for chunk in forget if chunk.group != "d.txt")  # each one once


def test_chunks_of_two_spans_are_divided_by_all_their_text() -> None:
    def chunk(number: int, *spans: Span) -> Chunk:
        return Chunk(number, f"q{number}", f"a{number}", tokens=(1, 2), n_prefix=1, spans=spans)

    a, b = chunk(0, Span(0, 0, 4), Span(1, 4, 8)), chunk(1, Span(1, 7, 9))
    assert sharing([b], [a]) == [b]
    assert sharing([a], [chunk(2, Span(1, 8, 9)), chunk(3, Span(0, 4, 9))]) == []
    attacked, scored = divided([a, b], 1, np.random.default_rng(0))
    assert len(attacked) == 1
    assert scored == []


def test_benign_attacks_train_on_text_or_on_instructions(tmp_path: Path) -> None:
    data = documents(tmp_path, template="{question}", benign=folder_of(tmp_path / "benign", z=50))
    cell = RelearnDataModule(data, "benign")
    assert {chunk.group for chunk in chunks_of(cell.attacked)} == {"z.txt"}
    other = folder_of(tmp_path / "other", y=45)
    cell = RelearnDataModule(data, "benign", benign_path=other)
    assert sorted(chunk.name for chunk in chunks_of(cell.attacked)) == ["y.txt#1", "y.txt#2", "y.txt#3"]
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "Add 1 and 1", "output": "2"}]), encoding="utf-8")
    cell = RelearnDataModule(data, "benign", benign_path=str(tmp_path / "alpaca.json"))
    (batch,) = cell.train_dataloader()
    ((prompt, answer),) = answered(batch["retain"])
    ids = data.tokenizer("Add 1 and 1", add_special_tokens=False)["input_ids"]
    assert prompt == ids
    assert answer[-1] == EOS
    assert PREFIX not in batch["retain"]


def test_text_is_asked_without_a_template(tmp_path: Path) -> None:
    data = documents(tmp_path)
    with pytest.raises(UserError, match="template: got 'chat'"):
        data.with_template("chat")
    sha = data.content_sha256()
    sources = str(tmp_path / "forget"), str(tmp_path / "retain")
    again = Documents(*sources, chunk_tokens=20, prefix_tokens=9, tokenizer=byte_tokenizer())
    assert again.content_sha256() != sha


def test_questions_and_chunks_in_a_set_are_no_passages() -> None:
    """A part of both kinds has the labels of each and no prefix."""
    chunk = Chunk(0, "ab", "cd", tokens=(1, 2, 3, 4), n_prefix=2, spans=(Span(0, 0, 4),))
    data = Toy(Splits([chunk, QAExample(1, "Who?", "Me")], [QAExample(2, "Where?", "Here")]), template="{question}")
    batch = next(iter(data.eval_dataloader("forget")))["forget"]
    assert PREFIX not in batch
    assert answered(batch)[0] == ([1, 2], [3, 4])
    assert list(chain(*answered(batch)[1]))[-1] == EOS
