"""Where an objective's model comes from: a checkpoint, or a model in memory, copied or in place."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.models.adapter_directory import has_adapters, merged
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import Architecture, use_architecture
from lightning_ssiuu.models.checks import check_weights
from lightning_ssiuu.models.loading import (
    hub_options,
    load_model,
    load_tokenizer,
    plain_configuration,
    prepared_tokenizer,
)
from lightning_ssiuu.models.lora import PLAIN_ROWS, LoRA
from lightning_ssiuu.utils.errors import Given, UserError, check_choice, naming

if TYPE_CHECKING:  # with it comes torch's compiler
    from transformers import PreTrainedModel

Bits = Literal["8bit", "4bit"]
Width = Literal["auto", "float32", "bfloat16", "float16", "float64"]


@dataclass
class ModelSource:
    """What :class:`~lightning_ssiuu.UnlearningModule` was told of its model; its arguments say what each is.

    Raises:
        UserError: If they contradict each other.
    """

    checkpoint: str
    model: Any = None
    tokenizer: Any = None
    in_place: bool = False
    revision: str | None = None
    attn_implementation: str | None = None
    dtype: Width | None = None
    lora: LoRA | None = None
    quantization: Bits | None = None
    architecture: Architecture | None = None

    def __post_init__(self) -> None:
        if self.quantization is not None:
            check_choice("quantization", self.quantization, Bits)
            if self.lora is None:
                allowed = "null without lora: quantised weights cannot be trained"
                raise UserError("quantization", self.quantization, allowed)
            if self.lora.is_dora:
                raise UserError("lora.options.use_dora", True, PLAIN_ROWS)
        if self.dtype is not None:
            check_choice("dtype", self.dtype, Width)
        if self.model is None:
            if self.tokenizer is not None or self.in_place:
                name = "in_place" if self.in_place else "tokenizer"
                value = self.in_place or Given(f"a {type(self.tokenizer).__name__}")
                raise UserError(name, value, "unset without model, which it belongs to")
            self.checkpoint = named(self.checkpoint, self.revision)
            return
        self._check_model()
        self._rows = getattr(self.model.config.get_text_config(), "vocab_size", None)
        self.checkpoint = self.model.config.name_or_path

    @property
    def given(self) -> Given:
        """A model in memory, for messages."""
        return Given(f"a {type(self.model).__name__} in memory")

    def _check_model(self) -> None:
        from transformers import PreTrainedModel

        model = self.model
        if not (isinstance(model, PreTrainedModel) or has_adapters(model)):
            raise UserError(
                "model", Given(f"a {type(model).__name__}"), "a causal language model of transformers, or one of peft's"
            )
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            raise UserError("tokenizer", Given(f"a {type(self.tokenizer).__name__}"), "the tokenizer of model")
        if not hasattr(model, "generate") or model.get_output_embeddings() is None:
            raise UserError("model", self.given, "a causal language model, with a head")
        for name in ("revision", "quantization", "attn_implementation"):
            if (value := getattr(self, name)) is not None:
                raise UserError(name, value, "null with a model in memory: it is for loading a checkpoint")
        if getattr(model, "is_quantized", False):
            raise UserError("model", self.given, "a model with plain weights (this one is quantised already)")
        if any(parameter.is_meta for parameter in model.parameters()):
            raise UserError("model", self.given, "a model whose weights are all in memory")

    def build(self, device: torch.device, **options: Any) -> AnswerModel:
        """The model, with new adapters where there are to be any; what is in memory is copied, or used itself.

        ``options`` are for loading a checkpoint (:func:`~lightning_ssiuu.models.loading.load_model`).

        Raises:
            UserError: If it cannot be loaded, or is needed a second time and was given to be used in place.
        """
        if self.lora is not None and self.lora.is_dora and "device_map" in options:
            raise UserError("lora.options.use_dora", True, "false under FSDP2")
        model = self._loaded(device, **options) if self.model is None else self._from_memory(options)
        return AnswerModel(model if self.lora is None else self.lora.attach(model))

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer, or a copy of the one given."""
        if self.model is None:
            return load_tokenizer(self.checkpoint)
        with naming("tokenizer"):
            return prepared_tokenizer(copy.deepcopy(self.tokenizer), self.checkpoint, self._rows)

    def torch_dtype(self) -> torch.dtype:
        """The type that the weights of a checkpoint are to have; without ``dtype`` torch's default.

        Lightning sets that: bfloat16 under precision bf16-true, float64 under 64-true.
        """
        if self.dtype is None:
            return torch.get_default_dtype()
        if self.dtype == "auto":
            kept = getattr(plain_configuration(self.checkpoint), "dtype", None)
            return kept if isinstance(kept, torch.dtype) else torch.float32
        return getattr(torch, self.dtype)

    def _loaded(self, device: torch.device, **options: Any) -> PreTrainedModel:
        if self.lora is not None:
            self.lora.check(self.checkpoint)
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        return load_model(self.checkpoint, self.torch_dtype(), self.quantization, device, self.architecture, **options)

    def _from_memory(self, options: dict[str, Any]) -> PreTrainedModel:
        if options:
            raise UserError("model", self.given, "a checkpoint under FSDP2, whose ranks load their shares")
        model = self.model
        if model is _USED:
            raise UserError("in_place", True, "false where the original model is needed a second time")
        if self.in_place:
            self.model = _USED
        else:
            model = copy.deepcopy(model)
        if has_adapters(model):
            model = merged(model, "model", self.given)
        if self.dtype not in (None, "auto"):
            model = model.to(self.torch_dtype())
        model.zero_grad(set_to_none=True)
        model.requires_grad_(True).eval()
        model.config.use_cache = False
        with naming("model"):
            check_weights(model, str(self.given))
        if self.architecture is not None:
            use_architecture(model, self.architecture)
        return model


_USED: Any = object()  # in place of a model that is being trained itself


def named(checkpoint: str, revision: str | None) -> str:
    """A checkpoint with its revision, as everything else takes it: ``ID@REVISION``.

    Raises:
        UserError: If there is a revision already, or the checkpoint is no hub id.

    Example:
        >>> named("org/model", "v1")
        'org/model@v1'
    """
    if revision is None:
        return checkpoint
    name = f"{checkpoint}@{revision}"
    if hub_options(checkpoint) != (checkpoint, {}) or hub_options(name) != (checkpoint, {"revision": revision}):
        raise UserError("revision", revision, f"null with checkpoint {checkpoint}: a branch, tag or commit of a hub id")
    return name
