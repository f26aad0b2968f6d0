"""Train vectors that stand before every prompt on a part of the forget set, the weights as they are.

Source: arXiv 2402.09063 ("Soft Prompt Threats: Attacking Safety Alignment and Unlearning in Open-Source LLMs through
the Embedding Space"), its universal attack. Vectors trained on the very item that is scored bring out anything, known
or not (arXiv 2502.15836); so they are trained on a fraction and scored on the rest, as relearning is, and the oracle
gets its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from lightning_ssiuu.attacks.trained_prompt import Change, Insertion, TrainedPrompt, free_ids, vector_gradient
from lightning_ssiuu.datamodules import QAExample, RelearnDataModule, UnlearningDataModule
from lightning_ssiuu.models.answers import AnswerModel, Part
from lightning_ssiuu.utils.errors import check_at_least, check_number


@dataclass
class SoftPrompt(TrainedPrompt):
    """Train a prefix of vectors on a fraction p of the forget set and score the rest with it.

    They stand before the first token of the prompt, after a token that begins every text, begin as the embeddings of
    random tokens and take Adam's steps down the answers' negative log-likelihood. Other options as in
    ``TrainedPrompt``.

    Args:
        n_vectors: Vectors, ≥ 0; with 0 the model is scored as it is.
        learning_rate: Adam's, in parts of the root mean square of the model's embeddings, > 0.

    Raises:
        UserError: If an option is outside its range; in :meth:`check`, strategy fsdp2, or a ``max_length`` that the
            prefix does not fit in.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> [(p, len(cell.attacked), len(cell.scored)) for p, cell in SoftPrompt(seeds=[0]).cells(Facts())]
        [(0.3, 11, 25)]
    """

    n_vectors: int = 8
    learning_rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("attack.n_vectors", self.n_vectors, 0)
        check_number("attack.learning_rate", self.learning_rate, positive=True)

    @property
    def length(self) -> int:
        """The number of vectors."""
        return self.n_vectors

    def place(self, data: UnlearningDataModule, example: QAExample) -> int:
        """After the token that begins a text, where the prompt has one."""
        (sequence,) = data.encoder.of(example)
        return int(sequence.input_ids[0] == data.tokenizer.bos_token_id)

    def learned(
        self, model: AnswerModel, cell: RelearnDataModule, batches: Iterator[Part], table: Tensor, change: Change
    ) -> Insertion:
        """Adam's steps from the embeddings of random tokens."""
        ids = free_ids(model, self.n_vectors)
        generator = torch.Generator().manual_seed(cell.seed)
        vectors = table[torch.randint(len(table), (self.n_vectors,), generator=generator)].clone().requires_grad_()
        optimizer = torch.optim.Adam([vectors], lr=self.learning_rate * float(table.square().mean().sqrt()))
        for part in islice(batches, self.steps if ids else 0):
            vectors.grad = vector_gradient(model, change(part, ids), vectors)
            optimizer.step()
        return Insertion(ids, vectors.detach())
