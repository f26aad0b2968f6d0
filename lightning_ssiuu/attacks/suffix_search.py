"""Search a string of tokens that, after any question, brings the answers out: one for all questions.

Source: arXiv 2307.15043 ("Universal and Transferable Adversarial Attacks on Aligned Language Models"), Algorithms 1 and
2: greedy coordinate gradient. It is searched on a part of the forget set and scored on the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.attacks.trained_prompt import (
    Change,
    Insertion,
    TrainedPrompt,
    free_ids,
    mean_loss,
    vector_gradient,
)
from lightning_ssiuu.datamodules import QAExample, RelearnDataModule, UnlearningDataModule
from lightning_ssiuu.datamodules.pairs import n_alike
from lightning_ssiuu.models.answers import AnswerModel, Part
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.training.gradients import sum_over_ranks
from lightning_ssiuu.utils.errors import UserError, check_at_least

_START = " !"
#: Ends of longer questions, no two with the same last token: what prompts end alike with is the template's.
_MORE = (" x1", " y2")


@dataclass
class SuffixSearch(TrainedPrompt):
    r"""Search a suffix of the question on a fraction p of the forget set and score the rest with it.

    Step by step: the gradient of the answers' negative log-likelihood by each token of the suffix names the ``top_k``
    tokens that would lower it most; ``candidates`` random exchanges of one token by one of these are tried, and the
    best suffix stays, the old one among them. The suffix begins as exclamation marks and stands behind the question's
    last token. Only suffixes are tried that are read back as the same tokens, so that they can be sent as text.

    Deviations: all of the fraction's questions take part from the first step on, ``batch_size`` at a time. Other
    options as in ``TrainedPrompt``.

    Args:
        n_tokens: Tokens of the suffix, ≥ 1.
        candidates: Exchanges that are tried in a step, ≥ 1.
        top_k: Tokens to draw from at each place, ≥ 1.

    Raises:
        UserError: If an option is outside its range; in :meth:`check`, strategy fsdp2, a ``max_length`` that the suffix
            does not fit in, or a tokenizer that does not read back what it gives.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> attack, data = SuffixSearch(n_tokens=4), Facts()
        >>> first = data.splits.forget[0]
        >>> data.tokenizer.decode(data.encoder.of(first)[0].input_ids[attack.place(data, first) :][:3])
        '\nAnswer:'
    """

    steps: int = 30
    n_tokens: int = 8
    candidates: int = 32
    top_k: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_tokens", "candidates", "top_k"):
            check_at_least(f"attack.{name}", getattr(self, name), 1)

    def check(self, data: UnlearningDataModule, score: str, devices: Devices) -> None:
        super().check(data, score, devices)
        start = self._start(data.tokenizer)
        if _read_back(start, data.tokenizer) != start:
            allowed = "one that reads back the text of a suffix as the same tokens"
            raise UserError("tokenizer", type(data.tokenizer).__name__, allowed)

    @property
    def length(self) -> int:
        """The number of tokens."""
        return self.n_tokens

    def place(self, data: UnlearningDataModule, example: QAExample) -> int:
        """Behind the question: what its prompt ends with is what it ends with after a longer question, too."""
        longer = (replace(example, question=example.question + more) for more in _MORE)
        own, *others = (data.encoder.of(one)[0].pair[0] for one in (example, *longer))
        return len(own) - n_alike(*(ids[::-1] for ids in (own, *others)))

    def learned(
        self, model: AnswerModel, cell: RelearnDataModule, batches: Iterator[Part], table: Tensor, change: Change
    ) -> Insertion:
        """Greedy exchanges of one token at a time."""
        tokenizer = cell.tokenizer
        suffix = self._start(tokenizer)
        allowed = torch.zeros(len(table), dtype=torch.bool, device=table.device)
        allowed[: min(len(table), len(tokenizer))] = True
        allowed[[token for token in tokenizer.added_tokens_decoder if token < len(table)]] = False
        generator = torch.Generator().manual_seed(cell.seed)
        for part in islice(batches, self.steps):
            free = change(part, free_ids(model, len(suffix)))
            slope = vector_gradient(model, free, table[suffix]) @ table.T
            best = slope.masked_fill(~allowed, torch.inf).topk(min(self.top_k, int(allowed.sum())), largest=False)
            tried = [suffix, *self._exchanges(suffix, best.indices.tolist(), generator, tokenizer)]
            losses = torch.stack([self._loss(model, change(part, one)) for one in tried])
            sum_over_ranks([losses], [losses])  # type: ignore[list-item]
            suffix = tried[int(losses.argmin())]
        return Insertion(suffix)

    def _start(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        ids = tokenizer(_START * self.n_tokens, add_special_tokens=False)["input_ids"]
        return list(ids)[: self.n_tokens]

    def _exchanges(
        self,
        suffix: list[int],
        best: Sequence[Sequence[int]],
        generator: torch.Generator,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Iterator[list[int]]:
        for _ in range(self.candidates):
            place = int(torch.randint(len(suffix), (), generator=generator))
            token = best[place][int(torch.randint(len(best[place]), (), generator=generator))]
            new = [*suffix[:place], token, *suffix[place + 1 :]]
            if new != suffix and _read_back(new, tokenizer) == new:
                yield new

    @staticmethod
    @torch.no_grad()
    def _loss(model: AnswerModel, part: Part) -> Tensor:
        return mean_loss(model, part).double()


def _read_back(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
