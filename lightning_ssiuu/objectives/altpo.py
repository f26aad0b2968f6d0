"""AltPO: prefer another plausible answer to the true one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from lightning_ssiuu.datamodules.pairs import asked
from lightning_ssiuu.models.answers import AnswerModel, Part
from lightning_ssiuu.objectives.backbone import Parts
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.dpo import dpo
from lightning_ssiuu.objectives.rejection import with_answers
from lightning_ssiuu.training.reference import Observation, reference_logps
from lightning_ssiuu.utils.errors import UserError, check_number


class _Example(NamedTuple):
    id: int
    prompt: list[int]
    answer: list[int]
    tokens: frozenset[int]  # of the prompt


class AltPO(UnlearningModule):
    """Alternate preference optimisation: :class:`~lightning_ssiuu.DPO`'s loss with a wrong answer of the right kind.

    Mekala et al., arXiv 2409.13474: where a plausible answer is preferred instead of a rejection, the model goes
    on answering. NLL (or ``kl``) on retain.

    Deviation: the paper lets the model write five alternates for each question; here an example's alternate is the
    answer to the retain question that is most like its own (by the tokens both have, of those that either has), another
    one than its own. So every alternate is a true answer to something else, and needs no second model.

    Args:
        beta: Inverse temperature β, > 0.
        seed: Which of equally similar questions is taken.

    Raises:
        UserError: If there is no retain answer to take.

    Example:
        >>> AltPO(beta=0.5).beta
        0.5
    """

    reads_part_alone = False

    def __init__(self, beta: float = 0.1, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_number("beta", beta, positive=True)
        self.beta, self.seed = beta, seed
        self.alternates: dict[int, list[int]] = {}  # token ids by example id

    def begin(self, parts: Parts) -> None:
        self.alternates = self._chosen(parts)  # the same in a resumed run: from the data alone

    def references(self) -> dict[str, Observation]:
        of_alternates = {f"forget/{self._name}": self._alternate_logps}
        return super().references() | {"forget/logps": reference_logps} | of_alternates

    def alternated(self, batch: Part) -> Part:
        """The questions of a part with their alternates for answers, ``[B, L']``; before training with their own."""
        pairs = zip(asked(batch), batch["example_id"].tolist(), strict=True)
        given = [
            (prompt, self.alternates.get(example, answer) if answer else []) for (prompt, answer), example in pairs
        ]
        return with_answers(batch, given, self.tokenizer)

    def forget_loss(self, batch: Part) -> Tensor:
        preferred, avoided = self.answers(self.alternated(batch)), self.answers(batch)
        before = self.original(f"forget/{self._name}", batch), self.original("forget/logps", batch)
        return dpo(preferred, avoided, *before, self.beta)

    @property
    def _name(self) -> str:
        # Values kept for other alternates are not to be taken for theirs.
        return f"alternates-{hashlib.sha256(repr(sorted(self.alternates.items())).encode()).hexdigest()[:12]}"

    def _alternate_logps(self, model: AnswerModel, part: Part) -> tuple[Tensor, Tensor | None]:
        return reference_logps(model, self.alternated(part))

    def _chosen(self, parts: Parts) -> dict[int, list[int]]:
        context = getattr(self.model.hf.config, "max_position_embeddings", None)
        retained = [one for one in _examples(parts("retain")) if one.answer]
        chosen = {}
        for one in _examples(parts("forget")):
            room = float("inf") if context is None else context - len(one.prompt)
            others = [other for other in retained if other.answer != one.answer and len(other.answer) <= room]
            if not others:
                raise UserError("data", "no retain answer", "a retain set whose answers fit, for AltPO's alternates")
            chosen[one.id] = max(others, key=partial(self._likeness, one)).answer
        return chosen

    def _likeness(self, one: _Example, other: _Example) -> tuple[float, bytes]:
        tie = hashlib.sha256(f"{self.seed} {one.id} {other.id}".encode()).digest()
        return len(one.tokens & other.tokens) / len(one.tokens | other.tokens), tie


def _examples(parts: Iterable[Part]) -> list[_Example]:
    return [
        _Example(example, prompt, answer, frozenset(prompt))
        for part in parts
        for (prompt, answer), example in zip(asked(part), part["example_id"].tolist(), strict=True)
    ]
