"""What all unlearning objectives share: loading, the training step, the optimiser, the regulariser's hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import Any, Literal, Self

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.evaluation.scorer import Scorer
from lightning_ssiuu.evaluation.scores import check_score
from lightning_ssiuu.models.answers import AnswerModel, Answers, Part, Reduction
from lightning_ssiuu.models.architectures import Architecture, find_architecture
from lightning_ssiuu.models.checks import diverging
from lightning_ssiuu.models.compiling import compile_backend
from lightning_ssiuu.models.lora import LoRA, adapters_kept_wide, check_adapter_state, without_frozen
from lightning_ssiuu.models.source import Bits, ModelSource, Width
from lightning_ssiuu.objectives.backbone import Kept, Parts, check_reduction, parts_in_order, take_options, values_of
from lightning_ssiuu.objectives.divergence import check_gradients, check_trained, finite_losses
from lightning_ssiuu.objectives.losses import answer_nll, kl_divergence
from lightning_ssiuu.objectives.step_memory import StepMemory, together
from lightning_ssiuu.regularizers import Regularizer
from lightning_ssiuu.training.checkpoints import Stateful, check_states, put_state, take_state
from lightning_ssiuu.training.fsdp import is_sharded, load_sharded
from lightning_ssiuu.training.hyperparameters import Restorable, hyperparameters, tell_loggers
from lightning_ssiuu.training.optimizers import optimizer_of
from lightning_ssiuu.training.progress import is_over, settle_progress
from lightning_ssiuu.training.random_states import random_states, set_random_state, state_of_rank
from lightning_ssiuu.training.reference import Observation, Reference, find_reference, reference_logits
from lightning_ssiuu.training.schedules import Schedule, ScheduleName, find_schedule, with_schedule
from lightning_ssiuu.training.strategies import check_strategy
from lightning_ssiuu.utils.distributed import mean_over_ranks, rank
from lightning_ssiuu.utils.errors import UserError, check_choice, check_number

Retain = Literal["nll", "kl"]
ReferenceFrom = Literal["cached", "second_model"]


class UnlearningModule(Stateful, Restorable, L.LightningModule):  # type: ignore[misc]
    """A causal language model and an objective that makes it forget; subclass it and write ``forget_loss``.

    Batches are dictionaries of parts, ``{"forget": part, "retain": part}``; a part holds ``input_ids, attention_mask,
    labels`` of shape ``[B, L]`` (prompt and padding −100 in ``labels``) and ``example_id`` of shape ``[B]``. The
    loss is ``forget_weight · forget_loss + retain_weight · retain_loss``, each a mean as ``reduction`` says, in nats.
    Objectives on a ``backbone`` have its losses: ``forget_weight``, ``retain_weight``, ``retain``, ``reference`` and
    ``reduction`` are set there if one is given, and otherwise go to the default backbone, gradient difference.

    Args:
        checkpoint: Hub id, local directory (of a model, or of adapters in peft's format), GGUF file or ``"tiny"``;
            loaded in ``configure_model``.
        optimizer: Takes the parameters, gives the optimiser (see :mod:`~lightning_ssiuu.training.optimizers`).
        lr_scheduler: Takes the optimiser, gives the scheduler (stepped once per optimiser step); or a name of
            :data:`~lightning_ssiuu.training.schedules.SCHEDULES`, or a function (or its import path) that takes
            ``num_warmup_steps`` and ``num_training_steps``, too, like those of transformers; None for constant.
        forget_weight: Weight of the forget loss, ≥ 0.
        retain_weight: Weight of the retain loss, ≥ 0.
        regularizer: Usually :class:`~lightning_ssiuu.regularizers.AttributionRegularizer`; None for none.
        lora: Train low-rank adapters (:class:`~lightning_ssiuu.models.lora.LoRA`) and freeze the weights; None trains
            the weights.
        quantization: ``"8bit"`` or ``"4bit"`` loads frozen weights in that width (extra ``[quantization]``); needs
            ``lora``.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        retain: The retain loss: ``"nll"``, the negative log-likelihood, or ``"kl"``, the divergence from the original
            model's predictions on the retain answers (objectives with a retain loss of their own refuse the latter).
        reference: How an objective compares with the original model: ``"cached"``, by values computed before the first
            step and kept on disk (with ``lora`` in every step, by the same weights without the adapters), or
            ``"second_model"``, a frozen copy in memory. See :mod:`lightning_ssiuu.training.reference`.
        scores: Names of the :mod:`scores <lightning_ssiuu.evaluation.scores>` of ``validate``, ``test`` and the table;
            None takes every score the data allows without generating text.
        architecture: Where the model's blocks and neurons are: the name of a registered type, the import path of an
            :class:`~lightning_ssiuu.models.architectures.Architecture`, or a record; None: by the checkpoint's type.
        warmup_steps: Of a schedule by name: optimiser steps, or below 1 the share of all steps.
        torch_compile: Compile the forward passes trained through: True or a backend's name. Not with a second gradient
            (a regulariser, SAM and its like), quantised or sharded weights.
        model: A model in memory instead of ``checkpoint``, of transformers, or of peft (its adapters are merged). It is
            copied in ``configure_model`` and stays as it is; the trained one is ``module.model.hf``. Not under FSDP2.
        tokenizer: The tokenizer of ``model``, always copied.
        in_place: Train ``model`` itself, without a copy: its weights, configuration and mode change.
        revision: Branch, tag or commit of a hub id; the same as ``checkpoint`` ``ID@REVISION``.
        attn_implementation: How transformers computes attention (``"sdpa"``, ``"eager"``, ...); None: its choice.
            Sequences are packed into one row with ``"sdpa"`` and flash attention, padded with others.
        dtype: Type of the loaded weights, ``"auto"`` for the checkpoint's own; None: as ``trainer.precision`` says.
        reduction: ``"sequence"``: losses of tokens are means over sequences of token means; ``"token"``: over all
            answer tokens of a micro-batch, of all ranks together. Losses of whole sequences (NPO's) are what they are.

    Raises:
        UserError: If an option is not finite or outside the range that its line gives, or contradicts another one.

    Example:
        >>> class Ascent(UnlearningModule):
        ...     def forget_loss(self, batch):
        ...         return self.answers(batch).mean_logps.mean()
        >>> module = Ascent(checkpoint="tiny", retain_weight=0.5)
        >>> module.configure_model()
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> part = {"input_ids": ids, "attention_mask": ids * 0 + 1, "labels": torch.tensor([[-100, -100, 7, 8]])}
        >>> bool(module.forget_loss(part) < 0)
        True
    """

    model: AnswerModel
    tokenizer: PreTrainedTokenizerBase
    can_be_backbone = True  #: False where it is more than its losses.
    reads_part_alone = True  #: False where its forget loss is of other texts than the part's, too.
    takes_token_means = True  #: Whether ``reduction`` can be ``"token"``.

    def __init__(
        self,
        checkpoint: str = "tiny",
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-5, weight_decay=0.0),
        lr_scheduler: ScheduleName | LRSchedulerCallable | Schedule | None = None,
        forget_weight: float = 1.0,
        retain_weight: float = 1.0,
        regularizer: Regularizer | None = None,
        lora: LoRA | None = None,
        quantization: Bits | None = None,
        gradient_checkpointing: bool = False,
        retain: Retain = "nll",
        reference: ReferenceFrom = "cached",
        scores: list[str] | None = None,
        architecture: str | dict[str, Any] | Architecture | None = None,
        warmup_steps: float = 0.0,
        torch_compile: bool | str = False,
        model: Any = None,
        tokenizer: Any = None,
        in_place: bool = False,
        revision: str | None = None,
        attn_implementation: str | None = None,
        dtype: Width | None = None,
        reduction: Reduction = "sequence",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(hyperparameters(self), logger=False)  # what it was made with, subclasses included
        self.architecture = find_architecture(architecture)
        check_number("forget_weight", forget_weight)
        check_number("retain_weight", retain_weight)
        check_choice("retain", retain, Retain)
        check_choice("reference", reference, ReferenceFrom)
        self.source = ModelSource(
            *(checkpoint, model, tokenizer, in_place, revision, attn_implementation, dtype),
            *(lora, quantization, self.architecture),
        )
        self.checkpoint, self.torch_compile = self.source.checkpoint, compile_backend(torch_compile)
        self.lora, self.quantization, self.gradient_checkpointing = lora, quantization, gradient_checkpointing
        self.strict_loading = lora is None  # a checkpoint then holds the adapters alone
        self.optimizer, self.warmup_steps = optimizer, warmup_steps
        self.lr_scheduler = find_schedule(lr_scheduler, warmup_steps)
        self.forget_weight, self.retain_weight, self.regularizer = forget_weight, retain_weight, regularizer
        self.retain, self.reference, self.reduction, self.scores = retain, reference, reduction, scores
        check_reduction(self)
        for name in scores or ():
            check_score(name)
        self._reference: Reference | None = None
        self.reference_key: str | None = None  # of the values on disk; a resumed run has its checkpoint's
        self._backbone: tuple[UnlearningModule, ...] = ()
        self._step_memory = StepMemory()
        self._last_batch: Mapping[str, Part] = {}
        self._random_states: dict[str, Any] | None = None

    # ---- what a subclass writes -------------------------------------------------------------------------------

    def forget_loss(self, batch: Part) -> Tensor:
        """Loss on the forget part of a batch (scalar, nats); descending it forgets. By default the backbone's."""
        if self._backbone:
            return self._backbone[0].forget_loss(batch)
        raise NotImplementedError(f"{type(self).__name__} has to define forget_loss(batch)")

    def retain_loss(self, batch: Part) -> Tensor:
        """Loss on the retain part of a batch (scalar, nats); by default what ``retain`` says, or the backbone's."""
        if self._backbone:
            return self._backbone[0].retain_loss(batch)
        answers = self.answers(batch)
        if self.retain == "kl":
            return kl_divergence(answers, self.original("retain/logits", batch), self.reduction)
        return answer_nll(answers, self.reduction)

    def kept_losses(self, batch: Part) -> Kept:
        """Weight and loss by name of what is to stay of a forget part, at the weights as they are (scalars, nats)."""
        return self._backbone[0].kept_losses(batch) if self._backbone else {}

    def unwritten(self) -> str | None:
        """Name of the method that a subclass still has to write; None for a complete objective."""
        own = type(self).forget_loss is not UnlearningModule.forget_loss
        return None if own or self._backbone or self.forget_weight == 0 else "forget_loss"

    def references(self) -> dict[str, Observation]:
        """What losses ask of the original, by ``"<part>/<what>"``; see :mod:`~lightning_ssiuu.training.reference`."""
        if self._backbone:
            return self._backbone[0].references()
        return {"retain/logits": reference_logits} if self.retain == "kl" and self.retain_weight > 0 else {}

    def begin(self, parts: Parts) -> None:
        """What is taken from ``parts(name)`` when training starts, or is resumed; by default what a backbone takes."""
        for backbone in self._backbone:
            backbone.begin(parts)

    def prepare(self) -> None:
        """What comes before the first step of a new run, once the original model was looked at; nothing by default."""

    # ---- what it may use --------------------------------------------------------------------------------------

    def answers(self, batch: Part) -> Answers:
        """Forward pass on a part; within a training step the same part is run once, however often it is asked for."""
        return self._step_memory.recall(batch, self, self.model)

    def original(self, name: str, batch: Part) -> Tensor:
        """What the original said of a part, by its name in :meth:`references`: ``[N, ...]``, without gradients."""
        if self._reference is None:
            raise RuntimeError("the original model is looked at when training starts; call this in a training step")
        return self._reference(name, batch)

    def training_parts(self, name: str, batch_size: int = 16) -> Iterator[Part]:
        """All examples of ``"forget"`` or ``"retain"`` in their order, the same on every rank, on this module's device.

        Raises:
            UserError: If the training loader is not one of :class:`~lightning_ssiuu.UnlearningDataModule`.
        """
        return parts_in_order(self.trainer.train_dataloader, name, batch_size, self.device, type(self).__name__)

    @property
    def backbone(self) -> UnlearningModule | None:
        """The objective whose losses this one uses, if it has none of its own."""
        return next(iter(self._backbone), None)

    def use_backbone(self, backbone: UnlearningModule) -> None:
        """Take losses, weights and references from another objective, which never loads a model of its own.

        Raises:
            UserError: If it has a regulariser, cannot be a backbone, or an option of it was given to this objective.
        """
        take_options(self, backbone, UnlearningModule)
        # In a tuple, so that torch does not register the backbone: it shares this module's parameters.
        self._backbone = (backbone,)

    def forward(self, batch: Part) -> Answers:
        if not self.is_loaded:
            raise RuntimeError("the model is loaded in configure_model(); call it or run under a Trainer first")
        return self.model(batch["input_ids"], batch["attention_mask"], batch["labels"])

    @property
    def second_gradient(self) -> str | None:
        """Who takes a gradient beside the loss's own, which some strategies do not allow; None if nobody does."""
        return None if self.regularizer is None else "a regularizer"

    @property
    def unlearns(self) -> bool:
        """Whether it trains on the forget set, to forget it."""
        return self.forget_weight > 0

    @property
    def is_loaded(self) -> bool:
        """Whether ``configure_model`` or :meth:`adopt` has run."""
        return "model" in self._modules

    # ---- Lightning --------------------------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> Self:
        with adapters_kept_wide(self):  # Lightning's bf16-true casts the whole module
            return super().to(*args, **kwargs)

    def setup(self, stage: str) -> None:
        check_strategy(self.trainer, self)

    def configure_model(self) -> None:
        if self.is_loaded:
            return
        if self.device_mesh is None:
            model = self.build(self.device if self._trainer is None else self._trainer.strategy.root_device)
        else:
            build = partial(self.build, torch.device("cpu"))
            model = load_sharded(build, self.device_mesh, self.trainer.strategy.root_device, self.quantization)
        self.adopt(model, self.source.load_tokenizer())
        self.model.train()

    def adopt(self, model: AnswerModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Use a model that is already in memory, as the attacks do to load once and train many times."""
        self.model, self.tokenizer = model, tokenizer
        if self._backbone:  # the same model, and the same memory of this step's forward passes
            self._backbone[0].adopt(model, tokenizer)
            self._backbone[0]._step_memory = self._step_memory
        if self.torch_compile is not None:
            model.compile_training(self.torch_compile)
        if self.gradient_checkpointing:
            model.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def on_train_start(self) -> None:
        with self.trainer.precision_plugin.forward_context():
            self.begin(self.training_parts)
        if observations := self.references():
            self._reference = find_reference(self, observations, self._random_states is not None)
            for backbone in self._backbone:
                backbone._reference = self._reference
        if self._random_states is None:
            self.prepare()
            if self.regularizer is not None:
                self.regularizer.prepare(self)
            if rank() > 0:  # seeded alike to set up alike, the ranks part here: each has dropout masks of its own
                torch.manual_seed(torch.initial_seed() + rank())
        else:  # nothing draws any more before the first step
            set_random_state(self._random_states, self.device)
            self._random_states = None
        tell_loggers(self, self.trainer)  # by ourselves: a run that is refused by now has not written anything

    def on_train_batch_start(self, batch: Mapping[str, Part], batch_idx: int) -> None:
        self._last_batch = batch

    def on_train_epoch_end(self) -> None:
        if self._last_batch and is_over(self.trainer):
            check_trained(self, self._last_batch)  # before any callback writes what the run has left

    def training_step(self, batch: Mapping[str, Part], batch_idx: int) -> Tensor:
        if self.regularizer is not None and "forget" in batch:
            self.regularizer.before_forward(self.model, batch["forget"])
        with self._step_memory(together(self, batch, UnlearningModule.retain_loss)):
            losses, kept = dict[str, Tensor](), Kept()
            if "forget" in batch and self.forget_weight > 0:
                losses["forget_loss"], kept = self.forget_loss(batch["forget"]), self.kept_losses(batch["forget"])
            if "retain" in batch and self.retain_weight > 0:
                losses["retain_loss"] = self.retain_loss(batch["retain"])
            if not losses:
                raise UserError("batch", sorted(batch), "a part with a weight above 0: forget or retain")
            loss = sum(getattr(self, name.replace("loss", "weight")) * value for name, value in losses.items())
            loss = sum((weight * value for weight, value in kept.values()), loss)
            if self.regularizer is not None and "forget" in batch:
                self.regularizer.collect(self.model, self.answers(batch["forget"]), batch["forget"])
                self.regularizer.before_backward(self.model, loss)
        self.log_training(finite_losses(mean_over_ranks(losses | values_of(kept)), self.global_step))
        return loss

    def log_training(self, figures: Mapping[str, float | Tensor]) -> None:
        """Log ``train/<name>``; the figures are the same on every rank."""
        self.log_dict({f"train/{name}": value for name, value in figures.items()}, batch_size=1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.regularizer is not None:  # gradients are complete here and not yet clipped
            self.log_training(self.regularizer.apply(self.model))
        if self._trainer is None or getattr(self.trainer.precision_plugin, "scaler", None) is None:
            check_gradients(self.named_parameters(), self.global_step)  # a scaler of losses skips such a step

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.regularizer is not None:
            self.regularizer.after_step(self.model)

    def validation_step(self, batch: Mapping[str, Part], batch_idx: int, dataloader_idx: int = 0) -> None:
        with diverging(self.global_step):
            self._scorer.update(batch)

    def on_validation_epoch_end(self) -> None:
        scores = self._scorer.compute(self.global_step)
        self.log_dict({f"{split}/{k}": v for split, s in scores.items() for k, v in s.items()})
        self._scorer.reset()

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def configure_optimizers(self) -> Any:
        n_steps = lambda: self.trainer.estimated_stepping_batches  # noqa: E731 - asked only where it is needed
        return with_schedule(optimizer_of(self, self.optimizer), self.lr_scheduler, self.warmup_steps, n_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._last_batch and self._trainer is not None and self.trainer.training:
            check_trained(self, self._last_batch)  # or the one before, which is good, would be gone
        checkpoint["random_states"] = random_states(self.device)
        if self.lora is not None and not is_sharded(self):
            checkpoint["state_dict"] = without_frozen(self, checkpoint["state_dict"])
        checkpoint |= {"reference": self.reference_key} | self.to_be_restored()
        for key, owner in self.stateful().items():
            put_state(checkpoint, key, owner.state())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.lora is not None:
            check_adapter_state(self, checkpoint.get("state_dict"))
        self.reference_key = checkpoint.get("reference")
        states = checkpoint.get("random_states")
        self._random_states = state_of_rank(states) if states else self._random_states
        folder = self._trainer.ckpt_path if self._trainer is not None else None
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            check_states(checkpoint, self.stateful(), folder)
            settle_progress(checkpoint, self._trainer.accumulate_grad_batches)
        for key, owner in self.stateful().items():
            if key in checkpoint:
                owner.load_state(take_state(checkpoint, key, self.model, folder))

    def stateful(self) -> dict[str, Stateful]:
        """Whose states a checkpoint holds, by their keys."""
        return {"objective": self} | ({} if self.regularizer is None else {"regularizer": self.regularizer})

    def build(self, device: torch.device, **options: Any) -> AnswerModel:
        """Load or copy the model again, as this module was configured, adapters included."""
        return self.source.build(device, **options)

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.model, self.tokenizer, self.scores)
