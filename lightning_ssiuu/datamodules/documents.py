"""Plain text to be unlearned: books, articles or records, cut into chunks of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_ssiuu.datamodules.base import QAExample, Splits, UnlearningDataModule
from lightning_ssiuu.datamodules.chunks import Chunk, exchanged, spans_of
from lightning_ssiuu.datamodules.columns import Columns
from lightning_ssiuu.datamodules.deletion import Deletion, IdNames, Ids, check_sources, read_key
from lightning_ssiuu.datamodules.encoding import Encoder
from lightning_ssiuu.datamodules.readers import Record, cell_of, cell_text, column, file_errors, read_records
from lightning_ssiuu.datamodules.spooled import kept
from lightning_ssiuu.utils.errors import UserError, check_at_least, check_choice
from lightning_ssiuu.utils.reading import reading

SUFFIXES = (".txt", ".md")
Document = tuple[str, str]  # name and text
_ALLOWED = "an existing .txt or .md file, a folder of them"


class Documents(UnlearningDataModule):
    r"""Forget, retain and test set from plain text: files, folders of files, or a column of a table.

    Instead of a source for each there may be one table of texts with ids, and what of it to forget.

    Documents are cut by tokens into chunks, however long they are; no token is left out. Trained are all tokens of a
    chunk, from the one after the first (after the beginning-of-sequence token where the tokenizer adds that). Scored is
    its continuation, given a prefix; neither has an end. Messages and results name a chunk by its document and its
    number there (``war.txt#3``). Blank chunks are left out, and from retain and test set those that stand in an earlier
    set, word for word; the log says how many.

    A relearning attack trains on whole documents, and on a region of the last one, and scores others; where there is
    only one document, other regions of it. The control of an attack are the chunks with each other's continuations.

    Args:
        forget: A ``.txt`` or ``.md`` file (one document), a folder of them, or a table with a column of texts: a file
            (as in :class:`CustomData`) or a data set of the hub (``owner/name:config:split``).
        retain: The same for what is to be kept.
        test: The same; None: no test set.
        benign: The same, for the benign relearning attack, which trains on its chunks; None: what ``benign_path`` of
            the attack names, text or instructions, else the instructions of ``tatsu-lab/alpaca``.
        chunk_tokens: Length of a chunk, without the beginning-of-sequence token.
        prefix_tokens: So many are given when a chunk is scored; of documents shorter than a chunk the same share.
        stride: Tokens from the beginning of a chunk to that of the next, at most ``chunk_tokens``; None: as many, so
            that no two overlap, but for the last one of a document, which ends with it.
        text_column: Column of the texts.
        name_column: Column of the documents' ids, by which they are called; None: found by its usual name, else the
            records are numbered.
        data: One table of texts instead of ``forget`` and ``retain``: what ``forget_ids`` or ``forget_where`` do not
            choose is the retain set.
        forget_ids: Ids of the documents to forget: a file with one a line, a table with a column of ids, or a list. All
            rows that share an id are meant.
        forget_where: A condition that holds for the rows to forget (:class:`~.predicate.Predicate`).
        ids: ``"shown"``, or ``"hashed"``: documents are called by keyed hashes of their ids, or of their files' names
            (:class:`~.deletion.IdNames`).
        id_key: File with the secret key of the hashes; it stays out of all results.
        **kwargs: See :class:`UnlearningDataModule`. ``template`` is for questions and answers that an attack may bring
            (Alpaca), and ``max_length`` their longest; neither changes a chunk.

    Raises:
        UserError: A file, folder, data set or column is missing, a text is none, the lengths or the sources do not go
            together; ids that the table does not have; a choice of no row or of every row.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "river.txt").write_text("The river was low. " * 9)
        >>> _ = (folder / "hill.txt").write_text("From the hill one sees both towns. " * 9)
        >>> options = {"chunk_tokens": 24, "prefix_tokens": 8}
        >>> data = Documents(str(folder / "river.txt"), str(folder / "hill.txt"), **options)
        >>> data.splits, data.splits.forget[1]
        (Splits(forget=3, retain=7, test=0, benign=0), Chunk(river.txt#2))
        >>> _ = (folder / "passages.csv").write_text("id,text\nA7,The ferry left at noon.\nB1,The mill stood still.\n")
        >>> Documents(data=str(folder / "passages.csv"), forget_ids=["B1"], **options).splits.forget
        [Chunk(B1#1)]
    """

    def __init__(
        self,
        forget: str | None = None,
        retain: str | None = None,
        test: str | None = None,
        benign: str | None = None,
        chunk_tokens: int = 128,
        prefix_tokens: int = 64,
        stride: int | None = None,
        text_column: str = "text",
        name_column: str | None = None,
        data: str | None = None,
        forget_ids: str | list[str | int] | None = None,
        forget_where: str | None = None,
        ids: Ids = "shown",
        id_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_at_least("chunk_tokens", chunk_tokens, 2)
        if not 1 <= prefix_tokens < chunk_tokens:
            raise UserError("prefix_tokens", prefix_tokens, f"1 to {chunk_tokens - 1}, less than chunk_tokens")
        if stride is not None and not 1 <= stride <= chunk_tokens:
            raise UserError("stride", stride, f"null, or 1 to {chunk_tokens}, chunk_tokens: no text is left out")
        check_choice("ids", ids, Ids)
        self.sources = {"forget": forget, "retain": retain, "test": test, "benign": benign}
        self.data, self.forget_ids, self.forget_where = data, forget_ids, forget_where
        check_sources(self.sources, data, forget_ids, forget_where)
        self.chunk_tokens, self.prefix_tokens, self.stride = chunk_tokens, prefix_tokens, stride
        self.text_column = text_column
        self.columns = Columns(id=name_column, argument="name_column")
        self.id_names = IdNames(read_key(id_key) if ids == "hashed" else None)
        self._n_documents = 0

    @cached_property
    def encoder(self) -> Encoder:
        """As in :class:`UnlearningDataModule`; its longest sequence is a chunk at least, if the model takes that."""
        encoder = super().encoder
        if self.max_length is None:
            longest = getattr(encoder.tokenizer, "model_max_length", None) or self.chunk_tokens + 1
            encoder.max_length = max(encoder.max_length, min(self.chunk_tokens + 1, longest))
        return encoder

    def with_template(self, template: str) -> Self:
        raise UserError("template", template, f"{self.template}: text is asked without one")

    def load_splits(self) -> Splits:
        if (most := self.encoder.longest_chunk) < self.chunk_tokens:
            raise UserError("chunk_tokens", self.chunk_tokens, f"at most {most}, what the model takes (max_length)")
        seen: set[bytes] = set()
        first_id = 0
        sets: dict[str, Sequence[QAExample]] = {}
        documents = {name: self._read(source, name) for name, source in self.sources.items() if source is not None}
        if self.data is not None:
            chosen = Deletion(self.forget_ids, self.forget_where, self.columns, self.id_names)
            rows = self._rows(read_records(self.data, "data"))
            documents["forget"], documents["retain"] = chosen.divided(rows, self._documents)
        for name in self.sources:
            chunks: Sequence[QAExample] = self._chunks(documents.get(name, ()), name, first_id)
            first_id += len(chunks)
            # The forget set may hold a passage twice
            fresh = chunks if name == "forget" else kept(chunk for chunk in chunks if _digest(chunk) not in seen)
            if len(fresh) < len(chunks):
                rank_zero_info(f"data.{name}: left out {len(chunks) - len(fresh)} chunks that stand in an earlier set.")
            seen.update(map(_digest, fresh))
            sets[name] = fresh
        return Splits(**sets)

    def invented(self) -> tuple[str, Sequence[QAExample]]:
        return "chunks with each other's continuations", kept(exchanged(self.splits.forget))

    def more(self, source: str, argument: str) -> Sequence[QAExample] | None:
        with reading(argument, source, _ALLOWED):
            path = Path(source).expanduser()
            is_text = path.is_dir() or path.suffix.lower() in SUFFIXES
        if not is_text and self.text_column not in next(read_records(source, argument), {}):
            return None
        first_id = 1 + max(example.example_id for _, examples in self.splits.items() for example in examples)
        return self.chunks(source, argument, first_id)

    def chunks(self, source: str, argument: str, first_id: int = 0) -> Sequence[Chunk]:
        """The chunks of a source (see ``forget``), numbered from ``first_id`` on.

        Raises:
            UserError: About ``argument``, if the source cannot be read.
        """
        return self._chunks(self._read(source, argument), argument, first_id)

    def _chunks(self, documents: Iterable[Document], argument: str, first_id: int) -> Sequence[Chunk]:
        left_out: list[str] = []
        chunks = kept(self._cut(documents, first_id, left_out))
        if left_out:
            rank_zero_info(f"data.{argument}: left out {len(left_out)} chunks or documents that are blank.")
        return chunks

    def _cut(self, documents: Iterable[Document], first_id: int, left_out: list[str]) -> Iterator[Chunk]:
        tokenizer, stride = self.tokenizer, self.stride or self.chunk_tokens
        options: dict[str, Any] = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        for given, text in documents:
            name = self.id_names(given)
            # The names of special tokens in a text are text; verbose would warn of its length
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            spans = spans_of(self._n_documents, len(ids), self.chunk_tokens, stride)
            self._n_documents += 1
            for number, span in enumerate(spans, 1):
                own = tuple(ids[span.start : span.stop])
                n_prefix = max(1, len(own) * self.prefix_tokens // self.chunk_tokens)
                prefix, rest = (tokenizer.decode(part, **options) for part in (own[:n_prefix], own[n_prefix:]))
                if not (prefix.strip() and rest.strip()):
                    left_out.append(name)
                    continue
                where: dict[str, Any] = {"number": number, "tokens": own, "n_prefix": n_prefix, "spans": (span,)}
                yield Chunk(first_id, prefix, rest, group=name, source_id=name, **where)
                first_id += 1

    def _read(self, source: str, argument: str) -> Iterator[Document]:
        with reading(argument, source, _ALLOWED):
            path = Path(source).expanduser()
            is_folder, is_text = path.is_dir(), path.suffix.lower() in SUFFIXES
            files = (
                sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
                if is_folder
                else [path]
            )
        if is_folder or is_text:
            if not (files and files[0].is_file()):
                raise UserError(argument, source, _ALLOWED)
            names = [file.relative_to(path).as_posix() if is_folder else file.name for file in files]
            records: Iterator[Record] = ({"text": text} for text in _texts(files, argument))
            yield from zip(names, column(records, "text", argument), strict=True)
            return
        try:
            given = read_records(source, argument)
        except UserError as error:
            raise UserError(argument, source, f"{_ALLOWED}, or {error.allowed}") from error
        for row in self._rows(given):
            yield from self._documents(*row)

    def _rows(self, records: Iterable[Record]) -> Iterator[tuple[Columns, int, Record]]:
        columns = None
        for number, record in enumerate(records):
            columns = columns or replace(self.columns, id=self.columns.id_column(record))
            yield columns, number, record

    def _documents(self, columns: Columns, number: int, record: Record) -> Iterator[Document]:
        if self.columns.id is not None:
            cell_of(record, self.columns.id, "name_column")  # named, so it has to be there
        text = cell_text(cell_of(record, self.text_column, "text_column"), number, self.text_column, "text_column")
        yield columns.id_of(record) or str(number + 1), text


def _digest(chunk: QAExample) -> bytes:
    return hashlib.blake2b(chunk.folded.encode(errors="surrogatepass"), digest_size=16).digest()


def _texts(files: Sequence[Path], argument: str) -> Iterator[str]:
    for file in files:
        with file_errors(argument, str(file)):
            text = file.read_text(encoding="utf-8-sig")
        yield text
