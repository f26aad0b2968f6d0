"""Losses on answers, as means over sequences of token means.

Every function works on the labelled positions alone (``N`` of them over ``B`` sequences); none sees a prompt or a
padding token, so none can forget to mask one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ssiuu.models.answers import Answers, mean_over_answers, sequence_sums


def answer_nll(answers: Answers) -> Tensor:
    """Negative log-likelihood: mean over sequences of the mean over answer tokens, in nats.

    Token-weighted means would let long answers, and under data parallelism ranks with long answers, weigh more.

    Example:
        >>> answers = Answers(torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), 2)
        >>> round(answer_nll(answers).item(), 4)  # log 4
        1.3863
    """
    return -answers.mean_logps.mean()


def gradient_ascent(answers: Answers) -> Tensor:
    """Loss of gradient ascent on the forget set: minus :func:`answer_nll`, so that descending it forgets.

    Source: gradient ascent of method GA (Jang et al., arXiv 2210.01504, Eq. 1, as a mean instead of a sum).

    Example:
        >>> answers = Answers(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([0]), 1)
        >>> round(gradient_ascent(answers).item(), 4)
        -1.3863
    """
    return -answer_nll(answers)


def unforgotten_ascent(answers: Answers, only_unforgotten: bool = True) -> Tensor:
    """:func:`gradient_ascent` over the answers that greedy decoding still gives token by token; others count 0.

    The mean is over all sequences, so that the fewer are left the smaller it is, and ranks with equal shares average
    right.

    Source: KLUE's choice of unforgotten samples (Yang et al., arXiv 2502.19207).

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])  # the first answer is given, the second is not
        >>> answers = Answers(logits, torch.tensor([0, 0]), torch.tensor([0, 1]), 2)
        >>> round(unforgotten_ascent(answers).item(), 4)  # −log(1 + e^−2) / 2
        -0.0635
    """
    if not only_unforgotten:
        return gradient_ascent(answers)
    wrong = sequence_sums((~answers.token_correct).float(), answers.sequence_index, answers.n_sequences)
    return answers.mean_logps.where(wrong == 0, 0.0).mean()


def kl_divergence(answers: Answers, reference_logits: Tensor) -> Tensor:
    """``KL(reference ‖ model)`` of the next-token distributions at the labelled positions, in nats.

    Mean over sequences of the mean over answer tokens; zero where the model predicts as the reference does.

    Args:
        answers: The model's.
        reference_logits: ``[N, V]`` at the same positions.

    Source: the retain term of KL minimisation (Maini et al., TOFU, arXiv 2401.06121, Sec. 4).

    Example:
        >>> answers = Answers(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), torch.tensor([0]), 1)
        >>> round(kl_divergence(answers, torch.tensor([[0.0, 100.0]])).item(), 4)  # log 2
        0.6931
    """
    wide = answers.token_logps.dtype
    target = reference_logits.to(wide).log_softmax(-1)
    per_token = F.kl_div(answers.logits.to(wide).log_softmax(-1), target, reduction="none", log_target=True).sum(-1)
    return mean_over_answers(per_token, answers)


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


def hidden_mse(hidden: Tensor, target: Tensor, answers: Answers) -> Tensor:
    """Squared distance of hidden states to a target: mean over sequences of token means of means over dimensions.

    Args:
        hidden: ``[N, H]`` at the labelled positions.
        target: ``[H]`` for all of them, or ``[N, H]`` one each.
        answers: Whose positions they are.

    Source: both losses of RMU (Li et al., arXiv 2403.03218, Sec. 4), whose published
    code takes the mean over dimensions, not the sum.

    Example:
        >>> answers = Answers(torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), 2)
        >>> hidden = torch.tensor([[1.0, 1.0], [3.0, 3.0], [2.0, 0.0]])
        >>> hidden_mse(hidden, torch.zeros(2), answers)  # ((1 + 9) / 2 + 2) / 2
        tensor(3.5000)
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    squared = (hidden.to(wide) - target.to(device=hidden.device, dtype=wide)).square().mean(-1)
    return mean_over_answers(squared, answers)


def random_direction(width: int, seed: int) -> Tensor:
    """``u/‖u‖`` with ``u ~ U[0, 1)`` from a generator of its own: the same on every rank and in every run.

    Args:
        width: H.
        seed: Of the generator.

    Returns:
        ``[H]`` float64 on the CPU.

    Example:
        >>> u = random_direction(4, seed=0)
        >>> round(u.norm().item(), 6), bool((u >= 0).all())
        (1.0, True)
    """
    u = torch.rand(width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return u / u.norm()
