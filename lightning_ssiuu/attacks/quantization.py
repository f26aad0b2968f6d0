"""Quantise the unlearned model: rounding may undo a change of the weights that was smaller than the rounding.

Source: arXiv 2410.16454 ("Catastrophic Failure of LLM Unlearning via Quantization"). Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_ssiuu.attacks.base import Attack, Outcome, Target, forget_score
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_model, load_tokenizer
from lightning_ssiuu.models.quantization import loading_options
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError, naming

WIDTHS = ("8bit", "4bit")


@dataclass
class Quantization(Attack):
    """Score the forget set with every model as it is, then with its projections in 8 and in 4 bits.

    8-bit is LLM.int8(), 4-bit NF4 with doubly quantised constants (:mod:`lightning_ssiuu.models.quantization`);
    embeddings, norms and the head stay as they are. LLM.int8() treats columns with outliers apart and looks for them
    batch by batch, so an 8-bit score may move a little with the batch size and the number of ranks.

    Args:
        widths: ``"8bit"``, ``"4bit"``.

    Raises:
        UserError: No width or an unknown one; without the extra ``[quantization]``; when it runs, a 4-bit model that
            this CPU would misread.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> cpu = Devices("cpu")
        >>> (outcome,) = Quantization(["8bit"]).run([Target("model", "tiny", cpu)], Facts(), "first_token", cpu)
        >>> outcome.variant, outcome.n_scored, outcome.before, outcome.forget_score
        ('8bit', 36, 100.0, 100.0)
    """

    widths: Sequence[str] = WIDTHS

    def __post_init__(self) -> None:
        if not self.widths or set(self.widths) - set(WIDTHS):
            raise UserError("attack.widths", list(self.widths), f"some of {list(WIDTHS)}")

    def check(self, data: UnlearningDataModule, score: str, devices: Devices) -> None:
        super().check(data, score, devices)
        if devices.sharded:
            raise UserError("strategy", "fsdp2", "auto or ddp: quantised weights cannot be cut over devices")
        for width in self.widths:
            loading_options(width, devices.dtype, devices.device)  # type: ignore[arg-type]

    def run(self, targets: Sequence[Target], data: UnlearningDataModule, score: str, devices: Devices) -> list[Outcome]:
        outcomes = []
        for target in targets:
            # 4-bit first: where it is refused nothing was scored in vain.
            scores = {width: _scored(target, data, score, width) for width in (*sorted(set(self.widths)), None)}
            outcomes += [
                self.outcome(target, data, score, scores[None], scores[width], width)
                for width in dict.fromkeys(self.widths)
            ]
        return outcomes


def _scored(target: Target, data: UnlearningDataModule, score: str, width: Any) -> float:
    # A function of its own, so that a model is gone before the next one is loaded.
    if width is None:
        return forget_score(*target.load(), data, score)
    devices, checkpoint = target.devices, target.checkpoint
    try:
        with naming(target.argument):
            model = AnswerModel(load_model(checkpoint, devices.dtype, width, devices.device, devices.architecture))
            tokenizer = load_tokenizer(checkpoint)
    except UserError as error:
        if error.argument != "quantization":
            raise
        allowed = f"{[other for other in WIDTHS if other != width]} for {target.argument} ({error.allowed})"
        raise UserError("attack.widths", width, allowed) from error
    return forget_score(model, tokenizer, data, score)
