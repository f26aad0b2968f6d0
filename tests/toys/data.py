"""Small data shared by the tests of the data modules: a tokenizer with a token per byte, and numbered examples."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightning_ssiuu.datamodules import QAExample, Splits, UnlearningDataModule

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def byte_tokenizer(bos: bool = False, chat: str | None = None, **kwargs: Any) -> PreTrainedTokenizerFast:
    """One token per byte, so expected ids can be written down; optionally adds BOS and EOS as BERT-like ones do."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<eos>", "<bos>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    specials = {"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>"} | kwargs
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat, **specials)
    if bos:
        numbered = [(name, vocabulary[name]) for name in ("<bos>", "<eos>")]
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing("<bos> $A <eos>", None, numbered)
    return fast


def examples(first: int, count: int, distractors: int = 0) -> list[QAExample]:
    """Numbered examples; every text starts with SECRET, so that a leak is easy to find."""
    return [
        QAExample(
            n,
            f"SECRET question {n}?",
            f"SECRET answer {n}",
            tuple(f"SECRET wrong {n} {k}" for k in range(distractors)),
            (f"SECRET paraphrase {n}?",),
            f"SECRET group {n}",
        )
        for n in range(first, first + count)
    ]


class Toy(UnlearningDataModule):
    """A benchmark made of the given sets."""

    def __init__(self, splits: Splits | None = None, tokenizer: Any = None, batch_size: int = 2, **kwargs: Any) -> None:
        super().__init__(tokenizer=tokenizer or byte_tokenizer(), batch_size=batch_size, **kwargs)
        self.given = splits or Splits(examples(0, 5, 2), examples(10, 7, 2), examples(20, 3, 2), examples(30, 4))

    def load_splits(self) -> Splits:
        return self.given
