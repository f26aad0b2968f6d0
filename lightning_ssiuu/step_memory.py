"""Forward passes that several parts of one training step ask for, run once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from lightning_ssiuu.models.answers import Answers

Part = Mapping[str, Tensor]


class StepMemory:
    """Forward passes of the current training step, so that loss and regulariser share one; empty between steps.

    Example:
        >>> memory = StepMemory()
        >>> with memory:
        ...     part = {}
        ...     memory.recall(part, lambda part: object()) is memory.recall(part, lambda part: object())
        True
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Part, Answers]] | None = None

    def __enter__(self) -> None:
        self._known = {}

    def __exit__(self, *_: object) -> None:
        self._known = None

    def recall(self, part: Part, run: Callable[[Part], Answers]) -> Answers:
        """The answers to ``part``, run at most once within a step."""
        if self._known is None:
            return run(part)
        # The part is kept beside its answers: an identity means nothing once its object is gone.
        if id(part) not in self._known:
            self._known[id(part)] = part, run(part)
        return self._known[id(part)][1]
