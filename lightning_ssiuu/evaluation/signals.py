"""What membership attacks read off a model, example by example, by name and with options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_ssiuu.evaluation.metrics.membership import (
    gradient_norm_score,
    loss_score,
    min_k,
    min_k_plus_plus,
    zlib_score,
)
from lightning_ssiuu.evaluation.options import made_with, split_options
from lightning_ssiuu.evaluation.predictions import Predictions
from lightning_ssiuu.utils.errors import UserError


@dataclass(frozen=True)
class Signal:
    """What an attack makes of an example.

    Args:
        values: From predictions to ``[B]`` values, higher for what looks like a member.
        gradient: Whether it takes gradients: predictions must then be made with them.
        options: Makes the signal with other options, which are its keyword arguments.
    """

    values: Callable[[Predictions], Tensor]
    gradient: bool = False
    options: Callable[..., Signal] | None = None


Tokens = tuple[Tensor, Tensor, int]


def _tokens(e: Predictions, eos: bool) -> Tokens:
    answers = e.answers_scored(eos)
    return answers.token_logps.detach(), answers.sequence_index, answers.n_sequences


def _loss(eos: bool = True) -> Signal:
    return Signal(lambda e: loss_score(*_tokens(e, eos)))


def _zlib(eos: bool = True) -> Signal:
    return Signal(lambda e: zlib_score(*_tokens(e, eos), e.references))


def _min_k(k: float = 0.4, eos: bool = True) -> Signal:
    _check_share(k)
    return Signal(lambda e: min_k(*_tokens(e, eos), k))


def _min_k_plus_plus(k: float = 0.4, eos: bool = True, least_deviation: float = 1e-6) -> Signal:
    _check_share(k)

    def values(e: Predictions) -> Tensor:
        answers = e.answers_scored(eos)
        rows = answers.sequence_index, answers.n_sequences
        with torch.no_grad():
            return min_k_plus_plus(answers.logits, answers.targets, *rows, k, least_deviation)

    return Signal(values)


def _gradient_norm(each: bool = False, eos: bool = True) -> Signal:
    def values(e: Predictions) -> Tensor:
        return gradient_norm_score(-e.answers_scored(eos).mean_logps, e.model.parameters(), each)

    return Signal(values, gradient=True)


def _check_share(k: float) -> None:
    if not 0 < k <= 1:
        raise UserError("k", k, "a fraction in (0, 1]")


_MAKERS: tuple[Callable[..., Signal], ...] = (_loss, _zlib, _min_k, _min_k_plus_plus, _gradient_norm)
#: By name: minus the mean loss per token, that over the size of the compressed answer, the least probable tokens, the
#: same standardised, minus the norm of the gradient (:mod:`lightning_ssiuu.evaluation.metrics.membership`).
SIGNALS: dict[str, Signal] = {make.__name__[1:]: replace(make(), options=make) for make in _MAKERS}


def find_signal(name: str, argument: str = "signal") -> Signal | None:
    """The signal of a name with its options; None where there is none of that name."""
    return signal_of(name, argument) if split_options(name, argument)[0] in SIGNALS else None


def signal_of(name: str, argument: str = "signal") -> Signal:
    """The signal of a name with its options.

    Raises:
        UserError: If there is none, or it does not take these.

    Example:
        >>> signal_of("min_k(k=0.2, eos=false)").gradient, signal_of("gradient_norm").gradient
        (False, True)
    """
    plain, options = split_options(name, argument)
    if plain not in SIGNALS:
        raise UserError(argument, name, f"one of {list(SIGNALS)}")
    signal = SIGNALS[plain]
    return made_with(signal.options, options, name, argument) if options else signal
