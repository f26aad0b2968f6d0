"""Forget losses defined token by token: UNDIAL, CE-U, WGA, SatImp and the logit margin of PDU.

All are means over sequences of token means, where the public code takes the mean over all tokens of a batch: the same
for answers of equal length, and for others independent of how a batch is cut over ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ssiuu.models.answers import Answers, mean_over_answers


def undial(answers: Answers, reference_logits: Tensor, beta: float) -> Tensor:
    """Cross-entropy with the original model's predictions after the answer's logit was lowered by β, in nats.

    Args:
        answers: The model's, to the forget questions.
        reference_logits: ``[N, V]`` the original model's at the same positions.
        beta: How much the answer token's logit is lowered, ≥ 0.

    Source: Dong et al., UNDIAL, arXiv 2402.10052. Answer tokens only; open-unlearning also takes prompt and padding.

    Example:
        >>> answers = Answers(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([0]), 1)
        >>> round(undial(answers, torch.zeros(1, 2), beta=10.0).item(), 4)  # log 2, whatever the target
        0.6931
    """
    strength = torch.full_like(answers.token_logps.detach(), -beta).unsqueeze(-1)
    lowered = reference_logits.to(strength.dtype).scatter_add(-1, answers.targets.unsqueeze(-1), strength)
    return _cross_entropy(answers, lowered)


def ceu(answers: Answers, skip_first: int = 1) -> Tensor:
    """CE-U: cross-entropy with the model's own predictions, taken as constants, without the answer's token, in nats.

    Args:
        answers: The model's, to the forget questions.
        skip_first: So many tokens at the beginning of each answer do not count. An answer without others adds 0.

    Source: Yang, CE-U, arXiv 2503.01224; the first token is skipped as in its training settings.

    Example:
        >>> answers = Answers(torch.zeros(2, 4), torch.tensor([0, 1]), torch.tensor([0, 0]), 1)
        >>> round(ceu(answers).item(), 4)  # log 4: the three others are equally likely
        1.3863
    """
    lengths = answers.lengths.long()
    position = torch.arange(len(answers.targets), device=lengths.device)
    position = position - (lengths.cumsum(0) - lengths)[answers.sequence_index]
    own = answers.logits.detach().to(answers.token_logps.dtype)
    others = own.scatter(-1, answers.targets.unsqueeze(-1), -torch.inf)
    return _cross_entropy(answers, others, position >= skip_first)


def wga(answers: Answers, beta: float) -> Tensor:
    """Weighted gradient ascent: ``mean p^β log p`` of the answer's tokens, the weight ``p^β`` a constant.

    With β = 0 it is gradient ascent; the larger β, the less a token that is unlikely already counts.

    Args:
        answers: The model's, to the forget questions.
        beta: ≥ 0.

    Source: Wang et al., G-effect, arXiv 2502.19301.

    Example:
        >>> answers = Answers(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([0]), 1)
        >>> round(wga(answers, beta=1.0).item(), 4)  # −log(4) / 4
        -0.3466
    """
    return satimp(answers, beta, 0.0)


def satimp(answers: Answers, beta1: float, beta2: float) -> Tensor:
    """Saturation and importance: ``mean p^β₁ (1 − p)^β₂ log p`` of the answer's tokens, the weights constants.

    With both 0 it is gradient ascent, with β₂ = 0 it is :func:`wga`.

    Args:
        answers: The model's, to the forget questions.
        beta1: Saturation, ≥ 0: how little a token counts that is unlikely already.
        beta2: Importance, ≥ 0: how little a token counts that the model is sure of.

    Source: Yang et al., SatImp, arXiv 2505.11953.

    Example:
        >>> answers = Answers(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([0]), 1)
        >>> round(satimp(answers, beta1=1.0, beta2=1.0).item(), 4)  # −log(2) / 4
        -0.1733
    """
    fixed = answers.token_logps.detach()
    # In logarithms a token's probability may be 0 to machine precision and its complement still be exact.
    weight = (beta1 * fixed).exp() * (-fixed.expm1()).pow(beta2)
    return mean_over_answers(weight * answers.token_logps, answers)


def logit_margin_flattening(answers: Answers) -> Tensor:
    """PDU's forget loss: squared distance of the largest logit from the mean logit, of the answer's tokens.

    In squared logits, not nats: 0 where all tokens are equally likely.

    Source: Entesari et al., arXiv 2506.05314. Here at the positions that predict the answer; open-unlearning's are one
    later.

    Example:
        >>> answers = Answers(torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([1]), torch.tensor([0]), 1)
        >>> logit_margin_flattening(answers)  # (3 − 1)²
        tensor(4.)
    """
    logits = answers.logits.to(answers.token_logps.dtype)
    return mean_over_answers((logits.max(-1).values - logits.mean(-1)).square(), answers)


def _cross_entropy(answers: Answers, target_logits: Tensor, counted: Tensor | None = None) -> Tensor:
    logits = answers.logits.to(target_logits.dtype)
    per_token = F.cross_entropy(logits, target_logits.softmax(-1), reduction="none")
    return mean_over_answers(per_token, answers, counted)
