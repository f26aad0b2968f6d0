"""From prompt and completion to token ids: those of their joint text, and where the completion begins."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase


class Piece(NamedTuple):
    """A stretch of a prompt or completion; in the data's ``own`` text the names of special tokens are text."""

    text: str
    own: bool = False


class Joined(NamedTuple):
    """Token ids of a prompt and its completion; not ``clean`` where a token stands across their boundary."""

    prompt: list[int]
    completion: list[int]
    clean: bool = True


def text_of(pieces: Iterable[Piece]) -> str:
    """The text that pieces make together."""
    return "".join(piece.text for piece in pieces)


def is_end(token: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a token can end a turn: the end-of-sequence token, and every token added to the vocabulary."""
    return token == tokenizer.eos_token_id or token in tokenizer.added_tokens_decoder


class JointTokenizer:
    """Tokenises a prompt and its completion as the one text that they are, without tokens around it.

    The completion begins with the first token that has a character of it. White space at the prompt's end goes into
    that token where the tokenizer puts it there (``"▁Paris"``). Where a token holds other characters of both, there is
    no boundary, and the two are tokenised apart. Tokenizers that do not say which characters a token stands for are
    asked for the prompt alone: its ids have to begin those of the joint text.

    Example:
        >>> from lightning_ssiuu.models.loading import load_tokenizer
        >>> tokenizer = load_tokenizer("tiny")
        >>> joined = JointTokenizer(tokenizer)([Piece("The answer: ")], [Piece("Paris")])
        >>> tokenizer.decode(joined.prompt), tokenizer.decode(joined.completion)
        ('The answer:', ' Paris')
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        names = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._special = _any_of(names)
        #: Finds tokens that a template writes to end a turn: all that were added, but for white space.
        self.added = _any_of(names | {str(token) for token in added})

    def __call__(self, prompt: Sequence[Piece], completion: Sequence[Piece]) -> Joined:
        prompt = _without(prompt)
        completion = _without(completion)
        if self._names_in_own(prompt, completion):
            if not self.tokenizer.is_fast:
                return self._by_prefix(prompt, completion, self._around_names)
            # The template's special tokens under names that no text has; those in the text are not looked for.
            tokenizer, places = self._renamed
            prompt, completion = ([self._rename(piece) for piece in pieces] for pieces in (prompt, completion))
            joined = self._by_offsets(tokenizer, text_of(prompt), text_of(completion), split_special_tokens=True)
            before, after = ([places.get(token, token) for token in part] for part in joined[:2])
            return Joined(before, after, joined.clean)
        if self.tokenizer.is_fast:
            return self._by_offsets(self.tokenizer, text_of(prompt), text_of(completion))
        return self._by_prefix(prompt, completion, lambda pieces: self._ids(text_of(pieces)))

    def _names_in_own(self, *parts: Sequence[Piece]) -> bool:
        # Whether the joint text has more names of special tokens than the template wrote.
        pieces = [piece for part in parts for piece in part]
        written = sum(len(self._special.findall(piece.text)) for piece in pieces if not piece.own)
        return len(self._special.findall(text_of(pieces))) != written

    def _by_offsets(self, tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, **options: Any) -> Joined:
        text, boundary = prompt + completion, len(prompt)
        encoded = _encoded(tokenizer, text, return_offsets_mapping=True, **options)
        ids, n_prompt, clean = list(encoded["input_ids"]), None, True
        for place, (start, stop) in enumerate(encoded["offset_mapping"]):
            answers = start >= boundary
            if start < boundary < stop:
                answers = text[start:boundary].isspace()
                clean &= answers or text[boundary:stop].isspace()
            if answers and n_prompt is None:
                n_prompt = place
            clean &= answers == (n_prompt is not None)
        if clean and n_prompt:
            return Joined(ids[:n_prompt], ids[n_prompt:])
        before, after = (list(_encoded(tokenizer, part, **options)["input_ids"]) for part in (prompt, completion))
        return Joined(before, after, clean=False)

    def _by_prefix(self, prompt: Sequence[Piece], completion: Sequence[Piece], ids_of: Any) -> Joined:
        joint = ids_of([*prompt, *completion])
        last = prompt[-1]
        shorter = [*prompt[:-1], last._replace(text=last.text.rstrip())]
        for candidate in (prompt, shorter):
            own = ids_of(candidate)
            if 0 < len(own) < len(joint) and joint[: len(own)] == own:
                return Joined(own, joint[len(own) :])
        return Joined(ids_of(prompt), ids_of(completion), clean=False)

    def _ids(self, text: str, **options: Any) -> list[int]:
        return list(_encoded(self.tokenizer, text, **options)["input_ids"])

    def _around_names(self, pieces: Sequence[Piece]) -> list[int]:
        # Between the template's special tokens every stretch is tokenised for itself, as text.
        stretches: list[Any] = [""]
        for piece in pieces:
            parts = [piece.text] if piece.own else re.split(f"({self._special.pattern})", piece.text)
            for number, part in enumerate(parts):
                if number % 2:
                    stretches += [self.tokenizer.convert_tokens_to_ids(part), ""]
                else:
                    stretches[-1] += part
        ids = ([one] if isinstance(one, int) else self._ids(one, split_special_tokens=True) for one in stretches if one)
        return [token for some in ids for token in some]

    @cached_property
    def _renamed(self) -> tuple[PreTrainedTokenizerBase, dict[int, int]]:
        # A copy that knows every special token by a second name, and whose id each of the copy's new ones means.
        tokenizer, places = copy.deepcopy(self.tokenizer), {}
        for token in self.tokenizer.added_tokens_decoder.values():
            if self._special.fullmatch(str(token)):
                own = self.tokenizer.convert_tokens_to_ids(str(token))
                options = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
                tokenizer.add_tokens([AddedToken(_second_name(own), special=False, **options)])
                places[tokenizer.convert_tokens_to_ids(_second_name(own))] = own
        return tokenizer, places

    def _rename(self, piece: Piece) -> Piece:
        if piece.own:
            return piece
        ids = self.tokenizer.convert_tokens_to_ids
        return Piece(self._special.sub(lambda match: _second_name(ids(match[0])), piece.text))


def _second_name(token: int) -> str:
    return f"\U0010fffd{token}\U0010fffd"  # private-use characters


def _without(pieces: Sequence[Piece]) -> list[Piece]:
    return [piece for piece in pieces if piece.text]


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted((name for name in names if name.strip()), key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> Any:
    # verbose=False: lengths are checked elsewhere, with an error instead of a warning
    return tokenizer(text, add_special_tokens=False, verbose=False, **options)
