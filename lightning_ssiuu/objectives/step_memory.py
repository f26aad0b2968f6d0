"""Forward passes that the losses and the regulariser share within a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from lightning_ssiuu.models.answers import AnswerModel, Answers, Part
from lightning_ssiuu.training.fsdp import is_sharded


def together(module: Any, batch: Mapping[str, Part], retain_loss: Callable[..., Any]) -> Mapping[str, Part]:
    """What of a batch an objective runs in one pass: all of it, or nothing; ``retain_loss`` is the usual one."""
    # A retain loss of one's own need not ask for the answers of its part.
    asked = type(module.backbone or module).retain_loss is retain_loss
    weighed = module.forget_weight != 0 and module.retain_weight != 0
    # A backward pass of the regulariser's own would go through the retain part, too. With cut weights that is worth it:
    # the gradients of the first part would wait for those of the second.
    apart = module.regularizer is not None and module.regularizer.differentiates and not is_sharded(module)
    return batch if asked and weighed and not apart else {}


class StepMemory:
    """Forward passes of the current training step, so that loss and regulariser share one; empty between steps.

    Called with a batch of which both parts will be asked for, it runs them in one pass once the forget part is.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Part, Answers]] | None = None
        self._together: list[Part] = []

    def __call__(self, together: Mapping[str, Part]) -> Self:
        self._together = [together[name] for name in ("forget", "retain") if name in together]
        return self

    def __enter__(self) -> None:
        self._known = {}

    def __exit__(self, *_: object) -> None:
        self._known, self._together = None, []

    def recall(self, part: Part, run: Callable[[Part], Answers], model: AnswerModel | None = None) -> Answers:
        """The answers of a part: ``run(part)``, or its share of a joint pass of ``model``."""
        if self._known is None:
            return run(part)
        # The part is kept beside its answers: an identity means nothing once its object is gone.
        if id(part) not in self._known:
            others = [o for o in self._together[1:] if id(o) not in self._known and part is self._together[0]]
            if others and model is not None:
                found = model(part["input_ids"], part["attention_mask"], part["labels"], *others)
                self._known |= {id(p): (p, answers) for p, answers in zip((part, *others), found, strict=True)}
            else:
                self._known[id(part)] = part, run(part)
        return self._known[id(part)][1]
