"""An answer's probability as Captum wants to have it: a function of the embeddings."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_ssiuu.models.answers import AnswerModel, Target, target_logps
from lightning_ssiuu.models.packing import padded


class FromEmbeddings(nn.Module):
    """The probabilities of the answers of one batch, from their embeddings.

    Args:
        model: The model.
        batch: ``input_ids, attention_mask, labels``; repeated where Captum repeats the embeddings.
        target: Which probability (:func:`~lightning_ssiuu.models.answers.target_logps`). Captum has no scale
            per example: a P(y|x) below 1e-45 is 0 to it.
    """

    def __init__(self, model: AnswerModel, batch: Mapping[str, Tensor], target: Target = "sequence") -> None:
        super().__init__()
        self.model, self.target = model, target
        self.batch = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    def forward(self, embeddings: Tensor) -> Tensor:
        """``[B]`` probabilities.

        Args:
            embeddings: ``[B, L, d]``.
        """
        times = len(embeddings) // len(self.batch["labels"])
        repeated = {name: values.repeat(times, 1) for name, values in self.batch.items()}
        handle = self.model.hf.get_input_embeddings().register_forward_hook(lambda *_: embeddings)
        try:
            with padded(self.model):
                return target_logps(self.model(**repeated), self.target).exp()
        finally:
            handle.remove()
