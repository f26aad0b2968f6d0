"""Fine-tuning: learn what the batch holds (before unlearning, for the oracle, and in relearning attacks)."""

from __future__ import annotations

from torch import Tensor

from lightning_ssiuu.models.answers import Part
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.losses import answer_nll


class FineTuning(UnlearningModule):
    """Minimises the negative log-likelihood of every part of the batch.

    Use it with ``train_on: all`` to teach a model the data before unlearning, with ``train_on: retain`` to make the
    oracle (the model that never saw the forget set), and under a :class:`~lightning_ssiuu.RelearnDataModule` to attack.

    Example:
        >>> FineTuning().retain_weight
        1.0
    """

    unlearns = False

    def retain_loss(self, batch: Part) -> Tensor:
        """Negative log-likelihood; the mean over the global batch also where ranks' shares differ in size.

        Then this is the rank's part of that mean times the number of ranks, for gradients are averaged over ranks. A
        sequence without an answer, which stands in where a rank would have none at all, counts nothing.
        """
        if self._trainer is None or self._trainer.world_size == 1:
            return super().retain_loss(batch)
        answers = self.answers(batch)
        n_sequences = self._trainer.strategy.reduce((answers.lengths > 0).sum(), reduce_op="sum")
        return -answers.mean_logps.sum() * self._trainer.world_size / n_sequences

    def forget_loss(self, batch: Part) -> Tensor:
        return answer_nll(self.answers(batch))
