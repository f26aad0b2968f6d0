"""One evaluated part of a batch: what scores read off a model, each computed when first asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from lightning_ssiuu.datamodules.tokenization import is_end
from lightning_ssiuu.evaluation.metrics.base import first_of_each
from lightning_ssiuu.models.answers import AnswerModel, Answers, Part
from lightning_ssiuu.models.checks import check_logits, check_peaks
from lightning_ssiuu.training.fsdp import is_sharded
from lightning_ssiuu.utils.distributed import gathered

#: Tokens beyond the longest option that a model may take to name one ("The answer is ...").
_ROOM_FOR_WORDS = 16


class Predictions:
    """What scores read off a model on one part of a batch, on its device; what none asks for is not computed."""

    def __init__(self, model: AnswerModel, tokenizer: PreTrainedTokenizerBase, part: Part) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.part: Mapping[str, Any] = part

    @cached_property
    def answers(self) -> Answers:
        """Teacher-forced forward pass on the true answers."""
        return self._answers(self.part)

    @cached_property
    def option_scores(self) -> Tensor:
        """``[B·K]`` mean log-probability per token of every option (nats), the true answer's first."""
        return self._answers(self.part["options"], self.option_of).mean_logps

    @property
    def option_of(self) -> Tensor:
        """``[B·K]`` the row of each option."""
        return self.part["options"]["option_of"]

    @cached_property
    def references(self) -> list[str]:
        return self._labelled(self.part["labels"])

    @cached_property
    def generations(self) -> list[str]:
        return self.continuations()

    def continuations(self, processors: Sequence[LogitsProcessor] = ()) -> list[str]:
        """Continue the prompts: each up to twice its own answer's length, at most 200 tokens.

        So an example's text does not depend on which others share its batch, or how many ranks share the set.
        Decoding is greedy unless one of the ``processors`` of the logits decides.
        """
        labels = self.part["labels"]
        return self._continued(self.part["input_ids"], labels, 2 * (labels != -100).sum(1), processors)

    @cached_property
    def choice_scores(self) -> Tensor:
        """``[B·K]`` mean log-probability per token of every option after the prompt that lists them all."""
        return self._answers(self.part["choices"], self.choice_of).mean_logps

    @property
    def choice_of(self) -> Tensor:
        """``[B·K]`` the row of each of those."""
        return self.part["choices"]["option_of"]

    @cached_property
    def choice_options(self) -> list[list[str]]:
        """The options of each example as text, the true answer first."""
        options: list[list[str]] = [[] for _ in self.part["input_ids"]]
        for row, text in zip(self.choice_of.tolist(), self._labelled(self.part["choices"]["labels"]), strict=True):
            options[row].append(text)
        return options

    @cached_property
    def choice_generations(self) -> list[str]:
        """Greedy continuations of the prompts that list the options: longest option + 16 tokens, at most 200."""
        choices = self.part["choices"]
        first = first_of_each(self.choice_of)
        lengths = (choices["labels"] != -100).sum(1)
        longest = lengths.new_zeros(int(first.sum())).scatter_reduce(0, self.choice_of, lengths, "amax")
        return self._continued(choices["input_ids"][first], choices["labels"][first], longest + _ROOM_FOR_WORDS)

    def _answers(self, part: Mapping[str, Tensor], groups: Tensor | None = None) -> Answers:
        answers: Answers = self.model(part["input_ids"], part["attention_mask"], part["labels"], groups=groups)
        check_peaks(answers.peaks)
        return answers

    def _labelled(self, labels: Tensor) -> list[str]:
        ends = self._ends(labels)
        return [self._decoded(row[row != -100], ends) for row in labels]

    def _ends(self, labels: Tensor) -> list[int]:
        # The tokens that end a text: the end-of-sequence token, and what ends the labelled turns.
        eos = self.tokenizer.eos_token_id
        last = {row[row != -100][-1].item() for row in labels if bool((row != -100).any())}
        return sorted({eos, *(token for token in last if is_end(token, self.tokenizer))})

    def _decoded(self, ids: Tensor, ends: list[int]) -> str:
        # Up to the end of the turn, whose token need not be one that decoding skips.
        tokens = ids.tolist()
        stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        return self.tokenizer.decode(tokens[:stop], skip_special_tokens=True)

    def _continued(
        self, ids: Tensor, labels: Tensor, limits: Tensor, processors: Sequence[LogitsProcessor] = ()
    ) -> list[str]:
        # Continues what stands before the labels, row by row at most so many tokens (200 where that is less).
        answered = labels != -100
        starts = answered.int().argmax(1).tolist()
        prompts = [row[:start] for row, start in zip(ids, starts, strict=True)]
        width = max(starts)
        pad, ends = self.tokenizer.pad_token_id, self._ends(labels)
        inputs = torch.stack([torch.cat([p.new_full((width - len(p),), pad), p]) for p in prompts])
        lengths = torch.tensor([len(p) for p in prompts], device=ids.device)
        mask = (torch.arange(width, device=ids.device) >= (width - lengths).unsqueeze(1)).long()
        most = limits.clamp(max=200).tolist()
        # Every step gathers sharded weights: ranks have to go through equally many.
        together = is_sharded(self.model)
        out = self.model.generate(
            input_ids=inputs,
            attention_mask=mask,
            max_new_tokens=max(gathered(max(most)) if together else most),
            do_sample=False,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=ends,
            synced_gpus=together,
            logits_processor=LogitsProcessorList([_Finite(), *processors]),
        )
        new = [row[width : width + limit] for row, limit in zip(out, most, strict=True)]
        return [self._decoded(row, ends) for row in new]


class _Finite(LogitsProcessor):
    """Refuses to choose among logits that are no numbers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_logits(scores)
        return scores
