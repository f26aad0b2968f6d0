"""Quantise the unlearned model: rounding may undo a change of the weights that was smaller than the rounding.

Source: arXiv 2410.16454 ("Catastrophic Failure of LLM Unlearning via Quantization"). Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_ssiuu.attacks.base import Outcome, forget_score, load_alone, model_name
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_model, load_tokenizer
from lightning_ssiuu.models.quantization import loading_options
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError, naming

WIDTHS = ("8bit", "4bit")


def check_quantization(widths: Sequence[str], where: Devices) -> None:
    """Check the widths, and that bitsandbytes is there, before a model is loaded.

    Raises:
        UserError: No width or an unknown one, weights cut over the ranks, or a missing bitsandbytes.

    Example:
        >>> check_quantization(["2bit"], Devices("cpu"))
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: quantization: got ['2bit'], allowed: some of ['8bit', '4bit']
    """
    if not widths or set(widths) - set(WIDTHS):
        raise UserError("quantization", list(widths), f"some of {list(WIDTHS)}")
    if where.sharded:
        raise UserError("strategy", "fsdp2", "auto or ddp: quantised weights cannot be cut over devices")
    for width in widths:
        options: Any = (width, where.dtype, where.device)
        loading_options(*options)


def quantization_attack(
    models: Mapping[str, str], data: UnlearningDataModule, score: str, where: Devices, widths: Sequence[str] = WIDTHS
) -> list[Outcome]:
    """Score the forget set with every model as it is, then with its projections in 8 and in 4 bits.

    8-bit is LLM.int8(), 4-bit NF4 with doubly quantised constants (:mod:`lightning_ssiuu.models.quantization`);
    embeddings, norms and the head stay as they are. LLM.int8() treats columns with outliers apart and looks for them
    batch by batch, so an 8-bit score may move a little with the batch size and the number of ranks.

    Args:
        models: Checkpoint by the name of the argument it was given for.
        data: Whose forget set is scored.
        score: A score's name.
        where: Launched devices.
        widths: ``"8bit"``, ``"4bit"``.

    Returns:
        One outcome for each model and width.

    Raises:
        UserError: What :func:`check_quantization` and loading raise, and a 4-bit model that this CPU would misread.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> (found,) = quantization_attack({"model": "tiny"}, Facts(), "first_token", Devices("cpu"), ["8bit"])
        >>> found.variant, found.n_scored, found.before, found.forget_score
        ('8bit', 36, 100.0, 100.0)
    """
    check_quantization(widths, where)
    outcomes, n_scored = [], len(data.splits.forget)
    for argument, checkpoint in models.items():
        # 4-bit first: where it is refused nothing was scored in vain.
        scores = {w: _scored(argument, checkpoint, data, score, where, w) for w in (*sorted(set(widths)), None)}
        for width in dict.fromkeys(widths):
            figures = (n_scored, scores[None], scores[width])
            outcomes.append(Outcome(model_name(argument), "quantization", width, 0, *figures, score=score))
    return outcomes


def _scored(
    argument: str, checkpoint: str, data: UnlearningDataModule, score: str, where: Devices, width: Any
) -> float:
    # A function of its own, so that a model is gone before the next one is loaded.
    try:
        with naming(argument):
            if width is None:
                model, tokenizer = load_alone(argument, checkpoint, where)
            else:
                model = AnswerModel(load_model(checkpoint, where.dtype, width, where.device, where.architecture))
                tokenizer = load_tokenizer(checkpoint)
    except UserError as error:
        if error.argument != "quantization":
            raise
        allowed = f"{[other for other in WIDTHS if other != width]} for {argument} ({error.allowed})"
        raise UserError("quantization", width, allowed) from error
    return forget_score(model, tokenizer, data, score)
