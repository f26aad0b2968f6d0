"""Whether a model knows the forget set at all, as it is asked and under other templates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.evaluation.chance import YARDSTICK, chance_of
from lightning_ssiuu.evaluation.retention import LEAST_KNOWN
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.answers import AnswerModel, Part
from lightning_ssiuu.utils.errors import Given, NotFinite, UserError

#: So many points above chance are more than half of what any template could give.
_ENOUGH = 50.0
#: Fewer points above chance are chance: a model that knows nothing may be on either side of it.
SOMETHING = 1.0
_ASKED = "probability"


@dataclass(frozen=True)
class Known:
    """What a model knows of the forget set under a template: a score, and what it is worth by chance, in percent."""

    template: str
    score: str
    value: float
    chance: float

    @property
    def above(self) -> float:
        """Points above chance."""
        return self.value - self.chance

    def __str__(self) -> str:
        return f"{self.score} {self.value:.4g} %, {self.chance:.4g} % by chance"


@dataclass(frozen=True)
class Knowledge:
    """What a model knows of the forget set as it is asked, and under the other template with which it knows most.

    Args:
        own: As it is asked.
        here: The same by probability, by which templates are compared.
        best: None where no other template is at hand, or none was asked because ``own`` is a lot.
    """

    own: Known
    here: Known
    best: Known | None

    @property
    def elsewhere(self) -> Known | None:
        """The best template, where the model knows more than twice as much under it."""
        best = self.best
        return best if best is not None and best.above >= max(LEAST_KNOWN, 2 * self.here.above) else None

    @property
    def nothing(self) -> bool:
        """Whether what it knows is less than a point above chance, by the score and by probability."""
        return max(self.own.above, self.here.above) < SOMETHING

    def mistake(self, argument: str) -> UserError:
        """The error for a model that knows nothing; ``argument`` is the one that names it."""
        if (best := self.elsewhere) is not None:
            allowed = f"{best.template!r}, with which the model knows most of the forget set ({best}; now {self.here})"
            return UserError("data.init_args.template", self.own.template, allowed)
        allowed = f"one that knows it: there is nothing to forget ({self.here}), or stopping.unknown warn"
        return UserError(argument, Given("a model that does not know the forget set"), allowed)

    def doubt(self) -> str | None:
        """Why this template tells little of the model, if so: it knows nothing, or far more under another one."""
        if (best := self.elsewhere) is not None:
            asked = f"asked with {self.own.template!r} the model knows little of the forget set ({self.here})"
            return f"{asked}, with {best.template!r} far more ({best}): --data.init_args.template"
        return f"the model does not know the forget set ({self.here})" if self.nothing else None

    def warning(self) -> str | None:
        """One line where little is known, or far more under another template."""
        if (text := self.doubt()) is not None:
            return text
        if max(self.own.above, self.here.above) < LEAST_KNOWN:
            return f"the model hardly knows the forget set ({self.here}): there is hardly anything to forget"
        return None


def knowledge(
    score: str,
    model: AnswerModel,
    tokenizer: PreTrainedTokenizerBase,
    data: UnlearningDataModule,
    value: float | None = None,
    chance: float | None = None,
) -> Knowledge | None:
    """What a model knows of the forget set; ``value`` and ``chance`` (percent) are what is known of its score already.

    Where that is not much, other templates are tried: ``plain``, ``chat`` if the tokenizer has one, and the question
    alone. They are compared by probability, which knows degrees where whole answers are right or wrong, on the first
    :data:`~lightning_ssiuu.evaluation.chance.YARDSTICK` examples. None where all answers are the same.
    """
    own = None
    if value is not None:
        if chance is None:
            chance = chance_of(score, model, tokenizer, data.eval_dataloader("forget"), others=retained(data))
        own = None if chance is None else Known(data.template, score, value, chance)
    own = own or known_under(None, _ASKED, model, tokenizer, data)
    if own is None:
        return None
    if own.above >= _ENOUGH:
        return Knowledge(own, own, None)
    here = own if own.score == _ASKED else known_under(None, _ASKED, model, tokenizer, data)
    others = [known_under(name, _ASKED, model, tokenizer, data) for name in other_templates(data)]
    return Knowledge(own, here or own, max(filter(None, others), key=lambda known: known.above, default=None))


def retained(data: UnlearningDataModule) -> Iterator[Mapping[str, Part]]:
    """Batches of the first retain examples, made where they are looked at: for ``others`` of a level by chance."""
    yield from data.eval_dataloader("retain", data.splits.retain[:YARDSTICK])


def other_templates(data: UnlearningDataModule) -> list[str]:
    """Templates at hand beside a data module's own."""
    chat = ["chat"] if getattr(data.tokenizer, "chat_template", None) else []
    return [name for name in ("plain", *chat, "{question}") if name != data.template]


def known_under(
    template: str | None, score: str, model: AnswerModel, tokenizer: PreTrainedTokenizerBase, data: UnlearningDataModule
) -> Known | None:
    """What a model knows of the first forget examples under a template (None: as they are asked).

    None if it cannot be used, or the score cannot be had or has no level by chance.
    """
    try:
        asking = data if template is None else data.with_template(template)
        loader = asking.eval_dataloader("forget", data.splits.forget[:YARDSTICK])
        value = evaluate(model, tokenizer, [loader], [score])["forget"][score]
    except NotFinite:
        raise
    except UserError:  # too long, no such template, or no options
        return None
    chance = chance_of(score, model, tokenizer, loader, others=retained(asking))
    return None if chance is None else Known(asking.template, score, value, chance)
