"""Fine-tuning: learn what the batch holds (before unlearning, for the oracle, and in relearning attacks)."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_ssiuu.models.answers import AnswerModel, Answers, Part
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
    #: Run what sequences begin with alike once, as attacks do; a regulariser may want each sequence's own gradient.
    shares = False

    def forward(self, batch: Part) -> Answers:
        if not self.shares or _drops(self.model):  # dropout differs between sequences
            return super().forward(batch)
        return self.model(batch["input_ids"], batch["attention_mask"], batch["labels"], share=True)

    def retain_loss(self, batch: Part) -> Tensor:
        """Negative log-likelihood; the mean over the global batch also where ranks' shares differ in size.

        Then this is the rank's part of that mean times the number of ranks, for gradients are averaged over ranks. A
        sequence without an answer, which stands in where a rank would have none at all, counts nothing.
        """
        if self._trainer is None or self._trainer.world_size == 1 or self.reduction == "token":
            return super().retain_loss(batch)
        answers = self.answers(batch)
        n_sequences = self._trainer.strategy.reduce((answers.lengths > 0).sum(), reduce_op="sum")
        return -answers.mean_logps.sum() * self._trainer.world_size / n_sequences

    def forget_loss(self, batch: Part) -> Tensor:
        return answer_nll(self.answers(batch), self.reduction)


def _drops(model: AnswerModel) -> bool:
    # Some models drop by a function, not by a layer: their configurations say how much, as they do for heads not there.
    said = model.hf.config.get_text_config().to_dict().items()
    inside = (v for name, v in said if "drop" in name and not name.startswith(("classifier", "summary")))
    layers = any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules())
    return model.training and (layers or any(isinstance(value, float) and value > 0 for value in inside))
