"""What the tables of peer_parity.py share: random models, batches of any lengths, and rows that say why they differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from shapes import random_llama
from torch import Tensor

from lightning_ssiuu.models.answers import AnswerModel

#: Where no difference is expected; transformers computes some losses of a float64 model in float32.
TOLERANCE = 1e-5
#: Of the logits, so that an answer token has a probability of about a half.
SCALE = 7.0


class Table:
    """A table in Markdown, printed row by row; ``agrees`` until a row differs without a reason."""

    def __init__(self, *columns: str) -> None:
        self.agrees = True
        print("\n| " + " | ".join(columns) + " | note |")
        print("|---" * (len(columns) + 1) + "|", flush=True)

    def row(
        self,
        names: Sequence[str],
        values: Sequence[float],
        differences: Sequence[float],
        note: str,
        limit: float,
        aside: str = "",
    ) -> None:
        """Print a row: what it is about, both sides' values, relative differences, and why they may differ.

        Args:
            names: Of the first columns.
            values: Ours and the peer's.
            differences: Relative ones; below the limit the sides agree.
            note: Why they may differ by more; empty where nothing may.
            limit: See above.
            aside: Said in any case.
        """
        same = all(difference < limit for difference in differences)  # a NaN is not
        self.agrees &= same or bool(note)
        said = aside, note if same or note else "NOT EXPECTED"
        figures = [*(f"{value:.6g}" for value in values), *(f"{difference:.1e}" for difference in differences)]
        print(f"| {' | '.join([*names, *figures])} | {'; '.join(filter(None, said))} |", flush=True)


def relative(mine: Tensor, other: Tensor) -> float:
    """Norm of the difference over the other's; 0 where both are zero."""
    difference = (mine - other).norm().item()
    return difference / max(other.norm().item(), 1e-300) if difference else 0.0


def toy(seed: int) -> AnswerModel:
    """A random Llama model in float64, made rather sure of some tokens: else weights like WGA's would all be near 0."""
    model = random_llama("toy", torch.float64, seed=seed).eval()
    with torch.no_grad():
        model.hf.get_output_embeddings().weight.mul_(SCALE)
    return model


@torch.no_grad()
def drawn(lengths: Sequence[tuple[int, int]], seed: int, model: AnswerModel) -> list[tuple[list[int], list[int]]]:
    """Random prompts, and answers drawn from a model, of (prompt, answer) lengths; no special token is among them."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for n_prompt, n_answer in lengths:
        ids = torch.randint(5, model.hf.config.vocab_size, (n_prompt,), generator=generator).tolist()
        for _ in range(n_answer):
            likely = model.hf(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
            likely[:5] = 0
            ids.append(int(torch.multinomial(likely, 1, generator=generator)))
        pairs.append((ids[:n_prompt], ids[n_prompt:]))
    return pairs
