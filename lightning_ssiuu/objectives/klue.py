"""KLUE: gradient difference that updates only the feed-forward neurons which carry the answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.evaluation.scorer import untouched
from lightning_ssiuu.functional.losses import unforgotten_ascent
from lightning_ssiuu.localization import knowledge_neurons, local_mask, neuron_weights
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.objectives.base import Part, UnlearningModule
from lightning_ssiuu.training.shards import local, reshard
from lightning_ssiuu.training.strategies import refuse_deepspeed
from lightning_ssiuu.utils.errors import UserError, check_number


class KLUE(UnlearningModule):
    """Knowledge-localised unlearning (Yang et al., FaithUn, EMNLP 2025, arXiv 2502.19207).

    Before the first step the neurons are chosen on the whole forget set
    (:func:`~lightning_ssiuu.localization.knowledge_neurons`); then gradient difference moves their rows and columns
    and nothing else: all other weights keep every bit, whatever the optimiser does (decay, momentum). The forget loss
    leaves out answers the model no longer gives.

    Deviations: the paper's code is not public. Mismatched questions are those of other forget examples; neurons are
    chosen once for the whole forget set; an answer counts as forgotten once greedy decoding, given the answer before
    it, misses a token.

    A step takes a second copy of the feed-forward weights: they are put back where no neuron was chosen.

    Args:
        share: Of the feed-forward neurons that train, in (0, 1].
        regularization: α ≥ 0 of the superficial-knowledge regularisation.
        mismatched: N ≥ 1, other questions per answer.
        only_unforgotten: Leave answers out of the forget loss once they are forgotten.
        seed: Of the choice of other questions.
        **kwargs: As :class:`UnlearningModule`, without ``lora``.

    Raises:
        UserError: If an option is outside its range, or weights are frozen (``lora``).

    Example:
        >>> module = KLUE(checkpoint="tiny")
        >>> module.configure_model()
        >>> [name for name, p in module.model.named_parameters() if p.requires_grad][:2]
        ['hf.model.layers.0.mlp.gate_proj.weight', 'hf.model.layers.0.mlp.up_proj.weight']
    """

    lends_losses = False

    def __init__(
        self,
        share: float = 0.1,
        regularization: float = 10.0,
        mismatched: int = 5,
        only_unforgotten: bool = True,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < share <= 1:
            raise UserError("share", share, "a share in (0, 1]")
        check_number("regularization", regularization)
        if mismatched < 1:
            raise UserError("mismatched", mismatched, "a number ≥ 1")
        if self.lora is not None:
            raise UserError("lora", "adapters", "null: a neuron's rows and columns are the weights' own, not adapters'")
        self.share, self.regularization, self.mismatched = share, regularization, mismatched
        self.only_unforgotten, self.seed = only_unforgotten, seed
        self.neurons: dict[int, Tensor] = {}  # by block, which train

    def setup(self, stage: str) -> None:
        """Refuse what keeps a second copy of the weights."""
        super().setup(stage)
        refuse_deepspeed(self.trainer, self)

    def adopt(self, model: AnswerModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the model and freeze all but the feed-forward projections."""
        super().adopt(model, tokenizer)
        trained = neuron_weights(model.hf)
        for name, parameter in model.hf.named_parameters():
            parameter.requires_grad_(name in trained)

    def prepare(self) -> None:
        """Choose the neurons; every rank looks at all examples, so that all choose alike."""
        with untouched(self.model), self.trainer.precision_plugin.forward_context():
            self.neurons = knowledge_neurons(
                self.model,
                self.training_parts("forget"),
                self.share,
                self.regularization,
                self.mismatched,
                self.seed,
                self.tokenizer.pad_token_id,
            )

    def forget_loss(self, batch: Part) -> Tensor:
        """Minus the negative log-likelihood of the answers still known, in nats."""
        return unforgotten_ascent(self.answers(batch), self.only_unforgotten)

    @torch.no_grad()
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """After the regulariser: no gradient outside, for clipping and the optimiser's averages."""
        super().on_before_optimizer_step(optimizer)
        for parameter, mask in self._masked():
            if parameter.grad is not None:
                local(parameter.grad).mul_(mask)

    @torch.no_grad()
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and put back what is outside: weight decay moves weights without a gradient."""
        reshard(self.model)
        before = [local(parameter).clone() for parameter, _ in self._masked()]
        with torch.enable_grad():
            super().optimizer_step(*args, **kwargs)
        for (parameter, mask), old in zip(self._masked(), before, strict=True):
            own = local(parameter)
            own.copy_(torch.where(mask, own, old))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also the neurons: a resumed run's weights would choose others."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["neurons"] = self.neurons

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the neurons of the interrupted run."""
        super().on_load_checkpoint(checkpoint)
        self.neurons = checkpoint.get("neurons", {})

    def _masked(self) -> list[tuple[torch.nn.Parameter, Tensor]]:
        found = dict(self.model.hf.named_parameters())
        masked = []
        for name, (layer, dimension) in neuron_weights(self.model.hf).items():
            parameter = found[name]
            everything = torch.ones(parameter.shape[dimension], dtype=torch.bool)  # where nothing was chosen yet
            masked.append((parameter, local_mask(self.neurons.get(layer, everything), parameter, dimension)))
        return masked
