"""Losses that prefer one answer to another, or none to the true one: DPO, NPO, SimNPO; means over sequences.

Where the papers write S for an answer's negative log-likelihood, this is ``−answers.logps``: a sum over the answer's
tokens, in nats.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_ssiuu.models.answers import Answers


def npo(answers: Answers, reference_logps: Tensor, beta: float) -> Tensor:
    """Negative preference optimisation: ``−(2/β) mean log σ(−β (log P − log P_ref))``.

    With β → 0, and for any β where the model is the reference, its gradient is gradient ascent's on sequence sums.

    Args:
        answers: The model's, to the forget questions.
        reference_logps: ``[B]`` the original model's log-probabilities of the same answers (nats).
        beta: Inverse temperature, > 0: the larger, the sooner an answer that became unlikely is left alone.

    Source: Zhang et al., arXiv 2404.05868.

    Example:
        >>> import torch
        >>> answers = Answers(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([0]), 1)
        >>> round(npo(answers, answers.logps, beta=0.5).item(), 4)  # 4 log 2
        2.7726
    """
    return _preference(reference_logps.to(answers.logps.dtype) - answers.logps, beta)


def dpo(
    preferred: Answers,
    rejected: Answers,
    reference_preferred_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """Direct preference optimisation: ``−(2/β) mean log σ(β (r_preferred − r_rejected))``, ``r = log P − log P_ref``.

    The factor 2/β, which the original lacks, makes it comparable with :func:`npo`, to which it falls back when
    ``r_preferred`` is 0.

    Args:
        preferred: The model's answers to be preferred (here: refusals).
        rejected: Those to be avoided (here: the true ones), to the same questions.
        reference_preferred_logps: ``[B]`` the original model's (nats).
        reference_rejected_logps: ``[B]`` the original model's (nats).
        beta: Inverse temperature, > 0.

    Source: Rafailov et al., arXiv 2305.18290, Eq. 7; for unlearning arXiv 2401.06121.

    Example:
        >>> import torch
        >>> answers = Answers(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([0]), 1)
        >>> round(dpo(answers, answers, answers.logps, answers.logps, beta=1.0).item(), 4)  # 2 log 2
        1.3863
    """
    wide = preferred.logps.dtype
    gained = preferred.logps - reference_preferred_logps.to(wide)
    return _preference(gained - (rejected.logps - reference_rejected_logps.to(wide)), beta)


def simnpo(answers: Answers, beta: float, delta: float = 0.0) -> Tensor:
    """NPO without a reference and normalised by length: ``−(2/β) mean log σ(−β (log P / n + δ))``.

    Args:
        answers: The model's, to the forget questions.
        beta: Inverse temperature, > 0.
        delta: Margin in nats per token; the paper's γ is β δ (this is how its public code has it).

    Source: Fan et al., arXiv 2410.07163.

    Example:
        >>> import torch
        >>> answers = Answers(torch.zeros(2, 4), torch.tensor([0, 1]), torch.tensor([0, 0]), 1)
        >>> round(simnpo(answers, beta=1.0).item(), 4)  # −2 log(4/5)
        0.4463
    """
    return _preference(-answers.mean_logps - delta, beta)


def _preference(margin: Tensor, beta: float) -> Tensor:
    return -2.0 / beta * F.logsigmoid(beta * margin).mean()
