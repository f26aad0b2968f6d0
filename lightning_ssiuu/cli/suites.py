"""What ``audit --suite`` finds out by itself about a model that others published."""

from __future__ import annotations

from lightning_ssiuu.datamodules import TOFU
from lightning_ssiuu.evaluation.published import PublishedModel, published
from lightning_ssiuu.utils.errors import UserError

#: Examples of each set that are scored: as many as the largest forget set has.
_SCORED = 400


def published_model(unlearned: str | None) -> PublishedModel:
    """What the unlearned model's name says; a UserError where it is missing or says nothing."""
    if unlearned is None:
        raise UserError("unlearned", None, "the model that --suite is asked about")
    return published(unlearned)


def suite_module(model: PublishedModel, path: str | None) -> TOFU:
    """TOFU's split that a model was unlearned on, asked as open-unlearning asks it; ``path`` None: the hub's."""
    return TOFU(
        path,
        split=model.split,
        tokenizer=model.checkpoint,
        max_eval_examples=_SCORED,
        **model.template,
    )
