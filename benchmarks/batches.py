"""Batches of answers of unequal length: of question files, or random tokens of the lengths such files have."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from timing import Batch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.datamodules.custom import CustomData

#: Mean, standard deviation, least and most tokens of prompt and answer, as measured on TOFU (``forget01`` and 400
#: questions of ``retain99``) with SmolLM2's tokenizer and the plain template.
LENGTHS = {
    "forget": ((25.8, 4.9, 18, 38), (39.2, 10.4, 16, 69)),
    "retain": ((19.8, 3.6, 11, 40), (34.6, 11.3, 11, 78)),
}


def file_batches(
    forget: str, retain: str, tokenizer: PreTrainedTokenizerBase, size: int, n: int, template: str = "plain"
) -> list[Batch]:
    """The first ``n`` training batches of ``size`` + ``size`` sequences that ``fit`` makes of two question files."""
    data = CustomData(
        forget, retain, tokenizer=tokenizer, template=template, batch_size=size, retain_batch_size=size, max_length=512
    )

    def endless() -> Iterator[Batch]:
        while True:
            yield from data.train_dataloader()

    return list(islice(endless(), n))


def unequal_batches(vocabulary: int, size: int, n: int, device: torch.device | str = "cpu") -> list[Batch]:
    """``n`` batches of random tokens whose lengths are spread as :data:`LENGTHS` says, padded right."""
    generator = torch.Generator().manual_seed(0)

    def length(mean: float, deviation: float, least: int, most: int) -> int:
        drawn = mean + deviation * torch.randn((), generator=generator).item()
        return min(max(round(drawn), least), most)

    def part(name: str) -> dict[str, Tensor]:
        rows, labels = [], []
        for _ in range(size):
            prompt, answer = (length(*spread) for spread in LENGTHS[name])
            rows.append(torch.randint(5, vocabulary, (prompt + answer,), generator=generator))
            labels.append(torch.where(torch.arange(prompt + answer) < prompt, -100, rows[-1]))
        tensors = {
            "input_ids": pad_sequence(rows, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "example_id": torch.arange(size),
        }
        return {field: tensor.to(device) for field, tensor in tensors.items()}

    return [{name: part(name) for name in LENGTHS} for _ in range(n)]


def shares(batches: list[Batch]) -> dict[str, float]:
    """What part of all positions is padding, and what part carries labels."""
    parts = [part for batch in batches for part in batch.values()]
    positions = sum(part["labels"].numel() for part in parts)
    real = sum(int(part["attention_mask"].sum()) for part in parts)
    labelled = sum(int((part["labels"] != -100).sum()) for part in parts)
    return {"padding": round(1 - real / positions, 3), "labels": round(labelled / positions, 3)}
