"""Low-rank adapters (LoRA, arXiv 2106.09685): train a few small matrices beside frozen, possibly quantised, weights."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel


@dataclass
class LoRA:
    """Options of the adapters an objective trains instead of the weights (through peft)."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] | None = None

    def attach(self, model: PreTrainedModel) -> None:
        """Put adapters into ``model`` in place: module names stay, only the adapters train."""
        raise NotImplementedError
