"""Continue prompts: batched by need, with a cache, each until its own end or its own limit."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.checks import check_logits
from lightning_ssiuu.models.drawing import Draw, draw
from lightning_ssiuu.utils.console import progress
from lightning_ssiuu.utils.distributed import gathered

#: What a model calls its cache, by transformers' version.
_CACHES = ("cache", "past_key_values")
#: Rows leave a batch where so many more tokens may come: beginning anew costs about as much as a few tokens.
_WORTH_LEAVING = 16


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Args:
        prompt: Its token ids.
        limit: Most tokens of the continuation.
        ends: Tokens that end it.
        draw: How it is sampled; None: greedy decoding. Temperature and top-p are the same for all requests of a call.
    """

    prompt: tuple[int, ...]
    limit: int
    ends: tuple[int, ...]
    draw: Draw | None = None


def continued(
    model: AnswerModel, requests: Sequence[Request], pad: int, rows: int, synchronised: bool = False
) -> list[list[int]]:
    """Token ids of the continuations, in the order of the requests; whatever ends one is its last token.

    What is needed together is generated together (:func:`by_need`). Equal prompts are read once. A batch ends with its
    last text, and rows that are done leave it: whenever half of them are.

    Args:
        model: Continues them by itself, or by its ``engine``.
        requests: At least one where ``synchronised``.
        pad: Token id to pad with.
        rows: Sequences at a time, where all are as long as the longest.
        synchronised: Whether every rank of the run has to go through the same number of forward passes, as where
            weights are sharded; each rank must call it then, and no row leaves its batch.

    Raises:
        NotFinite: If the model gives no numbers.
    """
    if model.engine is not None:
        return model.engine.continued(requests)
    batches = by_need(requests, rows)
    if synchronised:
        batches += [batches[-1]] * (max(gathered(len(batches))) - len(batches))
    found: list[list[int]] = [[] for _ in requests]
    for numbers in progress(batches, "generating"):
        texts = _continue([requests[number] for number in numbers], model, pad, synchronised)
        for number, text in zip(numbers, texts, strict=True):
            found[number] = text
    return found


def by_need(requests: Sequence[Request], rows: int) -> list[list[int]]:
    """Numbers of the requests, batch by batch: those that may become long first, like beside like.

    A batch takes no more room (tokens, padding included) than ``rows`` sequences of the longest prompt and the highest
    limit would: it has ``rows`` of them at least, while there are so many, and more where they are shorter.

    Example:
        >>> lengths = [(3, 2), (4, 100), (3, 2), (5, 90), (3, 2), (3, 2)]
        >>> by_need([Request((7,) * n, limit, ()) for n, limit in lengths], 2)
        [[1, 3], [0, 2, 4, 5]]
    """
    order = sorted(range(len(requests)), key=lambda n: (requests[n].limit, len(requests[n].prompt)), reverse=True)
    widest = max((len(request.prompt) for request in requests), default=0)
    room = rows * (widest + requests[order[0]].limit) if requests else 0
    batches: list[list[int]] = []
    longest = 0
    for number in order:
        longest = max(longest, len(requests[number].prompt))
        if not batches or (len(batches[-1]) + 1) * (longest + requests[batches[-1][0]].limit) > room:
            batches.append([])
            longest = len(requests[number].prompt)
        batches[-1].append(number)
    return batches


@torch.no_grad()
def _continue(requests: Sequence[Request], model: AnswerModel, pad: int, synchronised: bool) -> list[list[int]]:
    device = next(model.parameters()).device
    limits = torch.tensor([max(1, request.limit) for request in requests], device=device)
    n_ends = max(len(request.ends) for request in requests)
    ends = torch.tensor([[*r.ends, *[-1] * (n_ends - len(r.ends))] for r in requests], device=device).long()
    chosen = _Chosen(requests, int(limits.max()), device)
    most = max(gathered(int(limits.max()))) if synchronised else int(limits.max())
    called = next((name for name in _CACHES if name in inspect.signature(model.hf.forward).parameters), "")
    cache = _divisible_cache(model.hf) if called and not synchronised else None

    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(request.prompt for request in requests))}
    ids, mask = _padded(list(places), pad, device)
    width = ids.shape[1]
    of = torch.tensor([places[request.prompt] for request in requests], device=device)
    options: dict[str, Any] = {"do_sample": False, "use_cache": True, "pad_token_id": pad, "synced_gpus": synchronised}

    def generate(n_tokens: int, then: LogitsProcessor, *stop: StoppingCriteria) -> Tensor:
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=n_tokens,
            logits_processor=LogitsProcessorList([_Finite(), then]),
            stopping_criteria=StoppingCriteriaList(stop),
            **({} if cache is None else {called: cache}),
            **options,
        )

    if cache is not None and len(places) < len(requests):
        generate(1, first := _Kept())
        cache.batch_select_indices(of)
        ids, mask = ids[of], torch.cat([mask[of], mask.new_ones(len(of), 1)], 1)
        ids = torch.cat([ids, chosen.token(0, first.logits[of]).unsqueeze(1)], 1)
    else:
        ids, mask = ids[of], mask[of]

    found: list[list[int]] = [[] for _ in requests]
    going = torch.arange(len(requests), device=device)
    while True:
        done = _done(ids[:, width:], limits[going], ends[going])
        for row, tokens in zip(going[done].tolist(), ids[done, width:].tolist(), strict=True):
            found[row] = _ended(tokens[: requests[row].limit], requests[row].ends)
        left = (~done).nonzero().flatten()
        if not len(left):
            return found
        if len(left) < len(going):
            assert cache is not None
            cache.batch_select_indices(left)
            ids, mask, going = ids[left], mask[left], going[left]
        n_before = ids.shape[1]
        early_before = 0 if cache is None else width + most - _WORTH_LEAVING
        stop = _Stop(width, limits[going], ends[going], early_before)
        ids = generate(width + most - n_before, chosen.among(going, width), stop)
        mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - n_before)], 1)


def _padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[*[pad] * (width - len(prompt)), *prompt] for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return ids, (torch.arange(width, device=device) >= (width - lengths).unsqueeze(1)).long()


def _ended(tokens: list[int], ends: Sequence[int]) -> list[int]:
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]


def _divisible_cache(hf: Any) -> DynamicCache | None:
    # An empty cache whose rows can be picked; None for models that keep states of another kind.
    if getattr(hf, "_is_stateful", False):
        return None
    cache = DynamicCache(config=hf.config)
    kept = [*cache.layers, *filter(None, [getattr(cache, "layer_class_to_replicate", None)])]
    divisible = all(hasattr(k, "batch_select_indices") and not hasattr(k, "update_recurrent_state") for k in kept)
    return cache if divisible else None


def _done(new: Tensor, limits: Tensor, ends: Tensor) -> Tensor:
    ended = (new.unsqueeze(-1) == ends.unsqueeze(1)).any(-1).any(-1)
    return ended | (new.shape[1] >= limits)


class _Stop(StoppingCriteria):
    """Stops each row at its own limit and ends; below a width ``early_before`` all as soon as half of them are done."""

    def __init__(self, width: int, limits: Tensor, ends: Tensor, early_before: int) -> None:
        self.width, self.limits, self.ends, self.early_before = width, limits, ends, early_before

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = _done(input_ids[:, self.width :], self.limits, self.ends)
        return done | (2 * done.sum() >= len(done)) if input_ids.shape[1] < self.early_before else done


class _Finite(LogitsProcessor):
    """Refuses to choose among logits that are no numbers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_logits(scores)
        return scores


class _Kept(LogitsProcessor):
    """Keeps the logits it is given."""

    logits: Tensor

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits = scores
        return scores


class _Chosen:
    """The next token of each row: the likeliest one, or that on which the row's own random number falls."""

    def __init__(self, requests: Sequence[Request], n_tokens: int, device: torch.device) -> None:
        self.how = next((request.draw for request in requests if request.draw is not None), None)
        if self.how is not None:
            uniforms = [request.draw.uniforms(n_tokens) for request in requests if request.draw is not None]
            self.uniforms = torch.stack(uniforms).to(device, torch.float32 if device.type == "mps" else None)

    def token(self, number: int, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        if self.how is None:
            return logits.argmax(-1)
        numbers = self.uniforms[:, number]
        return draw(logits, numbers if rows is None else numbers[rows], self.how.temperature, self.how.top_p)

    def among(self, rows: Tensor, width: int) -> LogitsProcessor:
        """Leaves greedy decoding that token alone; of prompts that are ``width`` tokens long."""
        return _Alone(self, rows, width)


class _Alone(LogitsProcessor):
    def __init__(self, chosen: _Chosen, rows: Tensor, width: int) -> None:
        self.chosen, self.rows, self.width = chosen, rows, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.chosen.how is None:
            return scores
        token = self.chosen.token(input_ids.shape[1] - self.width, scores, self.rows)
        return torch.full_like(scores, -torch.inf).scatter(1, token.unsqueeze(1), 0.0)
