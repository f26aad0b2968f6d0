"""Generation by need: the texts of each row alone, on every architecture, and no more passes than they take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from toys.models import TOYS, VOCAB, random_model

from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.drawing import Draw, draw
from lightning_ssiuu.models.generation import Request, by_need, continued
from lightning_ssiuu.utils.errors import NotFinite

#: Frequent in the toys' texts: some rows end early.
ENDS = (0, 5)
#: Every toy, and those with windows that are shorter than the texts.
MODELS = [*((name, {}) for name in TOYS), *((name, {"sliding_window": 4}) for name in ("mistral", "gemma2"))]


def asked(n: int = 9, most: int = 24, seed: int = 0) -> list[Request]:
    """Prompts and limits of all lengths, two of them twice."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    requests = [Request(tuple(number(2, VOCAB) for _ in range(number(1, 8))), number(1, most), ENDS) for _ in range(n)]
    return [*requests, *requests[:2]]


def alone(model: AnswerModel, request: Request) -> list[int]:
    """A prompt without any other, by transformers' own generate."""
    ids = torch.tensor([request.prompt])
    options: dict[str, Any] = {"eos_token_id": list(request.ends), "pad_token_id": 1, "do_sample": False}
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.limit, use_cache=True, **options
    )
    return out[0, len(request.prompt) :].tolist()


def slowly(model: AnswerModel, request: Request) -> list[int]:
    """A sampled text alone, a whole pass for each token."""
    assert request.draw is not None
    tokens, new = list(request.prompt), list[int]()
    for uniform in request.draw.uniforms(request.limit):
        with torch.no_grad():
            logits = model.hf(torch.tensor([tokens + new]), use_cache=False).logits[:, -1].float()
        new.append(draw(logits, uniform[None], request.draw.temperature, request.draw.top_p).item())
        if new[-1] in request.ends:
            break
    return new


@contextmanager
def passes(model: AnswerModel) -> Iterator[list[tuple[int, ...]]]:
    """Rows and tokens of every forward pass inside."""
    shapes: list[tuple[int, ...]] = []
    hook = model.hf.register_forward_pre_hook(
        lambda _, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_texts_are_those_of_each_row_alone(name: str, options: dict[str, Any]) -> None:
    model = AnswerModel(random_model(name, torch.float32, **options)).eval()
    requests = asked()
    expected = [alone(model, request) for request in requests]
    assert len(set(map(len, expected))) > 4
    assert continued(model, requests, 1, 4) == expected
    assert continued(model, requests, 1, 100) == expected


def test_models_that_keep_other_states_are_batched_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests = AnswerModel(random_model("llama", torch.float32)).eval(), asked()
    expected = [alone(model, request) for request in requests]
    monkeypatch.setattr(type(model.hf), "_is_stateful", True)
    with passes(model) as shapes:
        assert continued(model, requests, 1, 100) == expected
    assert {rows for rows, _ in shapes} == {len(requests)}
    assert len(shapes) == max(map(len, expected))


@pytest.mark.parametrize("draws", [(1.0, None), (0.7, 0.8), (0.0, None)])
def test_samples_are_those_of_each_row_alone(draws: tuple[float, float | None]) -> None:
    model = AnswerModel(random_model("llama", torch.float64)).eval()
    requests = [
        replace(request, draw=Draw((3, place, number), *draws))
        for place, request in enumerate(asked(5))
        for number in range(3)
    ]
    found = continued(model, requests, 1, 6)
    assert found == [slowly(model, request) for request in requests]
    if draws[0]:
        assert len(set(map(tuple, found))) > 15
    assert continued(model, requests[::-1], 1, 4) == found[::-1]


def test_a_limit_of_nothing() -> None:
    model = AnswerModel(random_model("llama", torch.float32)).eval()
    first, second = asked(2)[:2]
    found = continued(model, [replace(first, limit=0), second], 1, 2)
    assert found == [[], alone(model, second)]


def test_a_prompt_is_read_once_however_many_samples_it_has() -> None:
    model = AnswerModel(random_model("llama", torch.float32)).eval()
    first, second = (Request((7, 8, 9, 10, 11)[:n], 6, ()) for n in (5, 3))
    requests = [replace(r, draw=Draw((number,))) for r in (first, second) for number in range(4)]
    with passes(model) as shapes:
        continued(model, requests, 1, 8)
    assert shapes == [(2, 5), *[(8, 1)] * 5]


def test_rows_that_are_done_leave_and_the_batch_ends_with_its_last() -> None:
    model = AnswerModel(random_model("llama", torch.float32)).eval()
    limits = (4, 4, 8, 30)
    with passes(model) as shapes:
        found = continued(model, [Request((7, 8, n + 2), limit, ()) for n, limit in enumerate(limits)], 1, 4)
    assert [len(text) for text in found] == [*limits]
    # All four for four tokens, then the two that are left; one of them for 22 more.
    assert shapes == [(4, 3), *[(4, 1)] * 3, *[(2, 1)] * 4, *[(1, 1)] * 22]
    with passes(model) as shapes:
        continued(model, [Request((7, 8), limit, tuple(range(VOCAB))) for limit in limits], 1, 4)
    assert len(shapes) == 1  # every token is an end


def test_short_ones_do_not_wait_for_long_ones() -> None:
    """The long ones of several batches are one batch: as many passes as tokens of the longest in each."""
    model = AnswerModel(random_model("llama", torch.float32)).eval()
    requests = [Request((7, n + 2), 40 if n % 4 == 0 else 3, ()) for n in range(16)]
    with passes(model) as shapes:
        continued(model, requests, 1, 4)
    assert sum(rows for rows, _ in shapes) == 4 * 40 + 12 * 3
    assert len(shapes) == 40 + 3


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_batches_hold_each_request_once_within_the_room(rows: int) -> None:
    requests = asked(60, 100)
    batches = by_need(requests, rows)
    assert Counter(number for batch in batches for number in batch) == Counter(range(len(requests)))
    room = rows * (max(len(request.prompt) for request in requests) + max(request.limit for request in requests))
    needs = [[requests[number] for number in batch] for batch in batches]
    for batch in needs:
        assert len(batch) * (max(len(r.prompt) for r in batch) + max(r.limit for r in batch)) <= room
    assert all(len(batch) >= rows for batch in batches[:-1])
    limits = [request.limit for batch in needs for request in batch]
    assert limits == sorted(limits, reverse=True)


@pytest.mark.parametrize("requests", [asked(2), [replace(one, draw=Draw((0,))) for one in asked(2)]])
def test_no_text_of_a_model_that_gives_no_numbers(requests: Sequence[Request]) -> None:
    model = AnswerModel(random_model("llama", torch.float32)).eval()
    model.hf.get_output_embeddings().weight.data[3] = torch.nan
    with pytest.raises(NotFinite, match="checkpoint"):
        continued(model, requests, 1, 4)
