"""CIR: unlearn with weight gradients from which what the whole forget set has in common is projected out."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.collapse import Bases, collapsed, find_common_directions, linear_layers
from lightning_ssiuu.evaluation.scorer import untouched
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.objectives.base import Part, UnlearningModule
from lightning_ssiuu.objectives.gradient_difference import gradient_difference_like
from lightning_ssiuu.training.strategies import refuse_deepspeed
from lightning_ssiuu.utils.errors import UserError


class CIR(UnlearningModule):
    """Collapse of irrelevant representations (Sondej & Yang, arXiv 2509.11816), on any backbone's losses.

    The forget loss's gradient of a linear layer is ``Σ_t g̃_t ã_tᵀ``: inputs a and output gradients g of its tokens,
    less their means and leading principal components over the forget set. Those are taken at the start of every
    epoch, each rank looking at all examples. Only these layers' weights train. The retain loss is the backbone's,
    its gradient left whole.

    Deviations: the backbone's forget loss stands for the paper's, which turns MLP outputs away from the original ones;
    the paper takes directions from the epoch before, which then only looks; it steps with SGD of a fixed update norm,
    here the optimiser is the user's. An optimiser that scales weights one by one, as Adam does, brings some of what
    was projected out back. Tokens that start a sequence count like others.

    Args:
        backbone: Any objective that lends its losses; None takes gradient difference.
        input_components: Principal components of the inputs to project out, ≥ 0 and at most a quarter of the width
            (more would leave small models no gradient); 0 leaves the inputs, mean included, as they are.
        gradient_components: The same of the output gradients.
        attention: Train attention's projections too.
        every_n_epochs: How often the directions are taken again, ≥ 1.
        **kwargs: As :class:`UnlearningModule`, without ``lora`` and ``gradient_checkpointing``; what belongs to the
            default backbone is as in :class:`~lightning_ssiuu.objectives.ssiuu.SSIUU`.

    Raises:
        UserError: If an option is outside its range, weights are frozen (``lora``: an adapter's gradient is no sum of
            ``g aᵀ`` of the layer), or activations are recomputed (``gradient_checkpointing``: without the projection).

    Example:
        >>> module = CIR(checkpoint="tiny", input_components=8)
        >>> type(module.backbone).__name__, module.input_components, module.gradient_components
        ('GradientDifference', 8, 36)
    """

    lends_losses = False

    def __init__(
        self,
        backbone: UnlearningModule | None = None,
        input_components: int = 24,
        gradient_components: int = 36,
        attention: bool = False,
        every_n_epochs: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value, least in (
            ("input_components", input_components, 0),
            ("gradient_components", gradient_components, 0),
            ("every_n_epochs", every_n_epochs, 1),
        ):
            if value < least:
                raise UserError(name, value, f"a whole number ≥ {least}")
        if self.lora is not None:
            raise UserError("lora", "adapters", "null: the gradient of an adapter is no sum of a layer's own g aᵀ")
        if self.gradient_checkpointing:
            raise UserError("gradient_checkpointing", True, "false: layers are recomputed without the projection")
        self.use_backbone(backbone or gradient_difference_like(self))
        self.input_components, self.gradient_components = input_components, gradient_components
        self.attention, self.every_n_epochs = attention, every_n_epochs
        self.bases: Bases = {}
        self._epoch_of_bases: int | None = None

    def setup(self, stage: str) -> None:
        """Refuse an engine that computes linear layers by itself."""
        super().setup(stage)
        refuse_deepspeed(self.trainer, self)

    def adopt(self, model: AnswerModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the model and freeze all but the layers' weights."""
        super().adopt(model, tokenizer)
        trained = {f"{name}.weight" for name in linear_layers(model.hf, self.attention)}
        for name, parameter in model.hf.named_parameters():
            parameter.requires_grad_(name in trained)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Take an epoch's directions before its first batch, unless a resumed run brought them."""
        # Not in on_train_epoch_start: Lightning leaves that out in a run resumed at the very end of an epoch.
        epoch = self.current_epoch
        if self._epoch_of_bases is not None and epoch < self._epoch_of_bases + self.every_n_epochs:
            return
        names = linear_layers(self.model.hf, self.attention)
        counts = self.input_components, self.gradient_components
        with untouched(self.model), self.trainer.precision_plugin.forward_context():
            parts = self.training_parts("forget")
            self.bases = find_common_directions(self.model, super().forget_loss, parts, names, *counts)
        self._epoch_of_bases = epoch

    def forget_loss(self, batch: Part) -> Tensor:
        """The backbone's value; its gradient is without the common directions once training has begun."""
        with collapsed(self.model.hf, self.bases):
            # A copy, as the step remembers passes by part: the regulariser's gradient is to be of an ordinary one.
            return super().forget_loss(dict(batch))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also the directions: in the middle of an epoch the weights would give others."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["bases"] = {name: list(pair) for name, pair in self.bases.items()}, self._epoch_of_bases

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the directions of the interrupted run."""
        super().on_load_checkpoint(checkpoint)
        if "bases" in checkpoint:
            bases, self._epoch_of_bases = checkpoint["bases"]
            self.bases = {name: (pair[0].to(self.device), pair[1].to(self.device)) for name, pair in bases.items()}
