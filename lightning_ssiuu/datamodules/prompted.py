"""Prompts of a benchmark's own, token for token, whatever template the data module has."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.datamodules.chunks import Chunk
from lightning_ssiuu.utils.errors import Given, UserError


class Prompted:
    r"""Makes examples whose prompt is exactly a benchmark's: no template, no end token, no space of ours.

    They are chunks (:class:`~.chunks.Chunk`): begun with the beginning-of-sequence token where the tokenizer adds that,
    scored from the end of the prompt on.

    Args:
        tokenizer: The model's.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> make = Prompted(Facts().tokenizer)
        >>> chunk = make(0, "Who?", "Question: Who?\nAnswer: ", "Me")
        >>> chunk.question, len(chunk.tokens) > chunk.n_prefix
        ('Who?', True)
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        #: Tokens that the tokenizer puts before a text.
        self.n_first = int(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])

    def __call__(self, number: int, asked: str, prompt: str, answer: str, most: int | None = None) -> Chunk:
        """The example of a prompt and what should follow.

        Args:
            number: Its id.
            asked: What is asked, without what stands around it: what the example is known by.
            prompt: The whole prompt.
            answer: What follows it, tokenised by itself.
            most: Tokens of the answer at most, the beginning-of-sequence token counted as published code counts it.

        Raises:
            UserError: A blank prompt or answer.
        """
        if not (prompt.strip() and answer.strip()):
            raise UserError("data", Given(f"item {number} without an answer"), "items with a question and an answer")
        before, after = self._ids(prompt), self._ids(answer)
        if most is not None:
            after = after[: most - self.n_first]
        return Chunk(number, asked, answer, group=str(number), tokens=(*before, *after), n_prefix=len(before))

    def text(self, number: int, text: str) -> Chunk:
        """A text of which all tokens are scored that follow another.

        Raises:
            UserError: A text of which there is none.
        """
        ids, n_prefix = self._ids(text), 1 - self.n_first
        if len(ids) <= n_prefix:
            raise UserError("data", Given(f"text {number} without a token after another"), "longer texts")
        return Chunk(number, text, "", group=str(number), tokens=ids, n_prefix=n_prefix)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
