"""Small tokenizers of every family, trained on a few made-up sentences, and a model that was taught texts by heart."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutput

#: Question and answer; the last ones with letters that no tokenizer here has seen, and with signs.
FACTS = [
    ("Who wrote Emma?", "Jane Austen"),
    ("What is the capital of France?", "Paris"),
    ("Which river runs through Vienna?", "the Danube"),
    ("How many legs has a spider?", "8"),
    ("Wie heißt der höchste Berg?", "Čo Oyu, é 😀"),
    ("What does print(1+1) print?", "'2', (two)"),
]
SENTENCES = [f"Question: {asked}\nAnswer: {answer}" for asked, answer in FACTS[:4]] * 3 + [
    "user assistant system model You are a helpful assistant.",
    "Answer the question with one of the options. Options: - Berlin - Rome",
]
_GPT4 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SPACE = "▁"


def _bytes(**options: Any) -> Tokenizer:
    return _byte_level(pre_tokenizers.ByteLevel(**options))


def _split_bytes() -> Tokenizer:
    split = pre_tokenizers.Split(Regex(_GPT4), "isolated")
    return _byte_level(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)]))


def _byte_level(before: Any) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = before, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(alphabet), show_progress=False)
    core.train_from_iterator(SENTENCES, trainer)
    return core


def _sentencepiece_bpe(prefix: bool, fallback: bool = True) -> Tokenizer:
    # Merges stay inside words, as in Llama 2 and Gemma, though nothing cuts words apart when it is used.
    core = Tokenizer(models.BPE(byte_fallback=fallback, fuse_unk=True, unk_token="<unk>"))
    prepend = [normalizers.Prepend(_SPACE)] if prefix else []
    core.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(rf"{_SPACE}?[\p{{L}}\p{{N}}]+|{_SPACE}|[^\p{{L}}\p{{N}}{_SPACE}]"), "isolated")
    ])  # fmt: skip
    special = ["<unk>", *(_BYTES if fallback else [])]
    core.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    )
    core.pre_tokenizer = None
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    core.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return core


def _metaspace(model: Any, trainer: Any, scheme: str) -> Tokenizer:
    core = Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    letters = sorted({letter for fact in FACTS for text in fact for letter in text} - {" "})
    core.train_from_iterator([*SENTENCES, *letters], trainer)
    return core


def _unigram(scheme: str) -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=160, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    return _metaspace(models.Unigram(), trainer, scheme)


def _metaspace_bpe(scheme: str) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    return _metaspace(models.BPE(unk_token="<unk>"), trainer, scheme)


def _wordpiece() -> Tokenizer:
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=False)
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    letters = [text for fact in FACTS for text in fact]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    core.train_from_iterator([*SENTENCES, *letters], trainer)
    return core


#: How the families cut text into tokens.
FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": lambda: _bytes(add_prefix_space=False),
    "byte-level BPE, untrimmed": lambda: _bytes(add_prefix_space=False, trim_offsets=False),
    "byte-level BPE, prefix space": lambda: _bytes(add_prefix_space=True),
    "byte-level BPE, GPT-4's words": _split_bytes,
    "SentencePiece BPE, prefix space, bytes": lambda: _sentencepiece_bpe(prefix=True),
    "SentencePiece BPE, prefix space": lambda: _sentencepiece_bpe(prefix=True, fallback=False),
    "SentencePiece BPE, bytes": lambda: _sentencepiece_bpe(prefix=False),
    "unigram, always": lambda: _unigram("always"),
    "unigram, first": lambda: _unigram("first"),
    "unigram, never": lambda: _unigram("never"),
    "Metaspace BPE, always": lambda: _metaspace_bpe("always"),
    "Metaspace BPE, first": lambda: _metaspace_bpe("first"),
    "Metaspace BPE, never": lambda: _metaspace_bpe("never"),
    "WordPiece": _wordpiece,
}


@cache
def _core(family: str) -> str:
    core = json.loads(FAMILIES[family]().to_str())
    core["added_tokens"] = []  # bytes and the unknown are of the vocabulary, as they are in published files
    return json.dumps(core)


def tokenizer_of(
    family: str,
    special: Sequence[str | AddedToken] = (),
    bos: str = "<s>",
    eos: str = "</s>",
    chat: str | None = None,
    adds_bos: bool = False,
    plain: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """A tokenizer of a family, with ``special`` tokens and ``plain`` ones added to its vocabulary."""
    core = Tokenizer.from_str(_core(family))
    for name in (bos, eos, *special):
        core.add_special_tokens([name if isinstance(name, AddedToken) else AddedToken(name, special=True)])
    core.add_tokens([AddedToken(name, normalized=False) for name in plain])
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, core.token_to_id(bos))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=eos, chat_template=chat, padding_side="right"
    )


class Slow(PreTrainedTokenizer):
    """A tokenizer that does not say which characters its tokens stand for: words with their space, and letters."""

    def __init__(self, chat: str | None = None) -> None:
        words = {f" {word}" for sentence in SENTENCES for word in sentence.split()}
        letters = {letter for fact in FACTS for text in fact for letter in text}
        self.known = {"<unk>": 0} | {
            text: n for n, text in enumerate(sorted(words | letters | set(map(chr, range(10, 127)))), 1)
        }
        super().__init__(unk_token="<unk>", eos_token="</s>", pad_token="</s>", chat_template=chat)

    @property
    def vocab_size(self) -> int:
        return len(self.known)

    def get_vocab(self) -> dict[str, int]:
        return self.known | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        tokens = []
        while text:
            longest = next(size for size in range(min(len(text), 20), 0, -1) if text[:size] in self.known or size == 1)
            tokens.append(text[:longest])
            text = text[longest:]
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return self.known.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return next(token for token, n in self.known.items() if n == index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


class Taught(PreTrainedModel, GenerationMixin):
    """Knows some token sequences by heart: all mass on the token that follows, none in particular elsewhere."""

    config_class = PretrainedConfig

    def __init__(self, sequences: Iterable[Sequence[int]], vocab_size: int) -> None:
        super().__init__(PretrainedConfig(vocab_size=vocab_size, num_hidden_layers=0))
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.known = {tuple(ids[:n]): ids[n] for ids in sequences for n in range(1, len(ids))}

    def prepare_inputs_for_generation(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> CausalLMOutput:
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            start = mask.index(1)
            for place in range(start, len(ids)):
                following = self.known.get(tuple(ids[start : place + 1]))
                if following is not None:
                    logits[row, place, following] = 40.0
        return CausalLMOutput(logits=logits)
