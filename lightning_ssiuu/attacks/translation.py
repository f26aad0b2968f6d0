"""Ask the same in other languages: what one language was taught to withhold another may give. Nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from lightning_ssiuu.attacks.prompting import Asked, Prompting, check_label, questions_of
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.datamodules.columns import id_text
from lightning_ssiuu.datamodules.readers import Record, cell_of, cell_text, read_records
from lightning_ssiuu.datamodules.splits import QAExample
from lightning_ssiuu.utils.errors import Given, UserError

_PATH = "attack.path"


@dataclass
class Translation(Prompting):
    """Score the questions as a file has them in other languages, one variant for each language.

    Scored are the examples that the file has in that language, and ``before`` is their score as they are. The answer is
    the true one as the data have it, unless the file gives it in that language, too.

    Args:
        path: The file; needed. Its columns: ``language``, what the variant is called; ``translation``, the question in
            it; ``id``, the example's own id (or its number), or ``question``, the question as the data have it; and
            perhaps ``answer``.

    Raises:
        UserError: In :meth:`check`, no file or one that cannot be read, a record of no forget example, or an example
            twice in a language.

    Example:
        >>> import json, pathlib, tempfile
        >>> from lightning_ssiuu import Facts
        >>> data = Facts()
        >>> record = {"language": "de", "question": data.splits.forget[0].question, "translation": "Was ist es?"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "german.jsonl")
        ...     _ = path.write_text(json.dumps(record))
        ...     (asked,) = Translation(str(path)).asked(data)
        >>> asked.variant, len(asked), asked.groups[0][1][0].question
        ('de', 1, 'Was ist es?')
    """

    paths: ClassVar[tuple[str, ...]] = ("path",)

    path: str | None = None

    def asked(self, data: UnlearningDataModule) -> list[Asked]:
        """What the file has of the forget set, by language."""
        if self.path is None:
            raise UserError(_PATH, None, "a file of translated questions, with language, translation, id or question")
        base = questions_of(data, self)
        by_id, by_question = {one.name: one for one in base}, {_folded(one.question): one for one in base}
        everywhere = {one.name for one in data.splits.forget} | {_folded(one.question) for one in data.splits.forget}
        found: dict[str, dict[int, QAExample]] = {}
        for number, record in enumerate(read_records(self.path, _PATH)):
            known, key = by_id, id_text(record.get("id"))
            if not key:
                known, key = by_question, _folded(_cell(record, "question", number))
            language = _cell(record, "language", number)
            check_label(language, "language", number)
            own = found.setdefault(language, {})
            if key not in known:
                if key in everywhere:  # of a larger set some are scored
                    continue
                raise UserError(_PATH, Given(f"record {number} of no forget example"), "records of forget examples")
            one = known[key]
            if one.example_id in own:
                raise UserError(_PATH, Given(f"an example twice in record {number}"), "each once in a language")
            answer = _cell(record, "answer", number) if record.get("answer") else one.answer
            wrong = one.distractors if answer == one.answer else ()
            question = _cell(record, "translation", number)
            own[one.example_id] = replace(one, question=question, answer=answer, distractors=wrong)
        several = [
            Asked.once(language, [one for one in base if one.example_id in own], [*_in_order(base, own)])
            for language, own in found.items()
            if own
        ]
        if not several:
            raise UserError(_PATH, self.path, "a file with at least one forget example that is scored")
        return several


def _in_order(base: Sequence[QAExample], own: dict[int, QAExample]) -> list[QAExample]:
    return [own[one.example_id] for one in base if one.example_id in own]


def _cell(record: Record, name: str, number: int) -> str:
    text = cell_text(cell_of(record, name, _PATH), number, name, _PATH)
    if not text.strip():
        raise UserError(_PATH, Given(f"a blank cell in record {number} of {name!r}"), "text")
    return text


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
