"""Tiny random models, batches and a bare Trainer, shared by the tests of the mathematics."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import ARCHITECTURES
from lightning_ssiuu.models.lora import LoRA, adapter_parameters

VOCAB = 31
_ALIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
_GROUPED = {**_ALIKE, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_GPT = {
    "vocab_size": VOCAB,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
_FALCON = {
    **{name: value for name, value in _ALIKE.items() if name != "intermediate_size"},
    "ffn_hidden_size": 24,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "bias": True,
}
#: Per toy: configuration class, arguments.
TOYS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", _GROUPED),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 4}),
    "olmo2": ("Olmo2Config", _GROUPED),
    "smollm3": ("SmolLM3Config", _GROUPED),
    "gpt_neox": ("GPTNeoXConfig", _ALIKE),
    "gpt2": ("GPT2Config", {**_GPT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 4, "n_inner": 24}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            **{k: v for k, v in _ALIKE.items() if k not in ("num_hidden_layers", "num_attention_heads")},
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "gemma2": ("Gemma2Config", {**_GROUPED, "head_dim": 4, "final_logit_softcapping": 3.0}),
    "gemma3_text": ("Gemma3TextConfig", {**_GROUPED, "head_dim": 4}),
    "phi3": ("Phi3Config", _GROUPED),
    "qwen2_moe": ("Qwen2MoeConfig", {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_GROUPED, **_EXPERTS, "head_dim": 4}),
    "mixtral": ("MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
    "starcoder2": ("Starcoder2Config", _GROUPED),
    "falcon": ("FalconConfig", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_mq": ("FalconConfig", {**_FALCON, "multi_query": True}),
    "falcon_rw": ("FalconConfig", {**_FALCON, "multi_query": False, "alibi": True, "parallel_attn": False}),
    "granite": ("GraniteConfig", {**_GROUPED, "logits_scaling": 4.0}),
}


EXPERTS = ("qwen2_moe", "qwen3_moe", "mixtral")
#: Toys with a record, and one without.
RECORDED = [name for name, (kind, _) in TOYS.items() if getattr(transformers, kind).model_type in ARCHITECTURES]
UNRECORDED = "granite"


#: What has been made, by what it was made of; tests get copies, which take less time than a new one.
_MADE: dict[str, Any] = {}


def random_model(
    name: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, **kwargs: Any
) -> PreTrainedModel:
    """A small random model, without dropout unless asked for."""
    key = repr((name, dtype, seed, torch.get_default_device(), sorted(kwargs.items())))
    if key not in _MADE:
        _MADE[key] = _random_model(name, dtype, seed, **kwargs)
    return copy.deepcopy(_MADE[key])


def _random_model(name: str, dtype: torch.dtype, seed: int, **kwargs: Any) -> PreTrainedModel:
    config_class, arguments = TOYS[name]
    config = getattr(transformers, config_class)(**{**arguments, **kwargs})
    with torch.random.fork_rng(), torch.inference_mode(False):
        torch.manual_seed(seed)
        # Products of all experts at once are not there in float64.
        options = {"experts_implementation": "eager"} if name in EXPERTS else {}
        model = transformers.AutoModelForCausalLM.from_config(config, **options).to(dtype)
    model.config.use_cache = False
    return widened(model) if dtype == torch.float64 else model


def widened(model: PreTrainedModel) -> PreTrainedModel:
    """The model with norms that compute in the weights' type; the architectures' own do so in float32 always."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                is_gemma = not hasattr(child, "variance_epsilon")
                eps = child.eps if is_gemma else child.variance_epsilon
                wide = (ShiftedNorm if is_gemma else nn.RMSNorm)(child.weight.shape, eps=eps, device="meta")
                wide.weight = child.weight
                setattr(module, name, wide)
    return model


class ShiftedNorm(nn.RMSNorm):
    """Gemma's: the weight is what is added to one."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, tuple(self.normalized_shape), 1.0 + self.weight, self.eps)


def answer_model(name: str = "llama", dtype: torch.dtype = torch.float64, **kwargs: Any) -> AnswerModel:
    """The same, wrapped; with tied embeddings by default."""
    key = repr(("wrapped", name, dtype, torch.get_default_device(), sorted(kwargs.items())))
    if key not in _MADE:
        _MADE[key] = AnswerModel(random_model(name, dtype, **{"tie_word_embeddings": True, **kwargs}))
    return copy.deepcopy(_MADE[key])


def part(lengths: Sequence[tuple[int, int]], seed: int = 0, vocab: int = VOCAB) -> dict[str, Tensor]:
    """Random sequences of the given (prompt, answer) lengths, padded right."""
    generator = torch.Generator().manual_seed(seed)
    width = max(prompt + answer for prompt, answer in lengths)
    ids = torch.full((len(lengths), width), 1)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(lengths):
        ids[row, : prompt + answer] = torch.randint(2, vocab, (prompt + answer,), generator=generator)
        mask[row, : prompt + answer] = 1
        labels[row, prompt : prompt + answer] = ids[row, prompt : prompt + answer]
    example_id = torch.arange(len(lengths))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "example_id": example_id}


def batch(seed: int, forget: Sequence[tuple[int, int]] = ((3, 1), (5, 2), (2, 3))) -> dict[str, dict[str, Tensor]]:
    """A training batch with unequal lengths in both parts."""
    return {"forget": part(forget, 2 * seed), "retain": part([(4, 2), (3, 4)], 2 * seed + 1)}


def example_log_probability(hf: nn.Module, one: Mapping[str, Tensor], row: int) -> tuple[Tensor, int]:
    """Slow reference: log P of one example's answer from the full logits of that example alone, and its length."""
    n = int(one["attention_mask"][row].sum())
    ids, labels = one["input_ids"][row : row + 1, :n], one["labels"][row]
    logps = hf(input_ids=ids).logits[0].log_softmax(-1)
    where = [k for k in range(n) if labels[k] != -100]
    return torch.stack([logps[k - 1, ids[0, k]] for k in where]).sum(), len(where)


class Recorder(torch.optim.SGD):
    """SGD that keeps the gradients it is about to use: after the regulariser, after clipping."""

    def __init__(self, params: Any, lr: float, log: list[list[Tensor]] | None = None, **kwargs: Any) -> None:
        super().__init__(params, lr=lr, **kwargs)
        self.log = log if log is not None else []

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        self.log.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        super().step()
        return loss


def bare_trainer(max_steps: int = -1, **kwargs: Any) -> L.Trainer:
    """A silent Trainer on one CPU."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    return L.Trainer(max_steps=max_steps, **{**quiet, **kwargs})


def loader(batches: Iterable[Any]) -> DataLoader:
    """Serve ready-made batches as they are."""
    return DataLoader(list(batches), batch_size=None, collate_fn=lambda ready: ready)


def weights(module: nn.Module) -> list[Tensor]:
    """A copy of all parameters."""
    return [p.detach().clone() for p in module.parameters()]


def equal(left: Iterable[Tensor], right: Iterable[Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Norm of the difference relative to the norm of ``right``."""
    a, b = (torch.cat([x.double().flatten() for x in side]) for side in (left, right))
    return ((a - b).norm() / b.norm().clamp(min=1e-300)).item()


def norm(values: Any) -> float:
    """Euclidean norm over several tensors."""
    return math.sqrt(sum(float(v.double().square().sum()) for v in values))


def adapted(model: Any, r: int = 3, noise: float = 0.1, **kwargs: Any) -> Any:
    """Adapters that are no longer where they start: B is not zero."""
    torch.manual_seed(6)
    LoRA(r=r, alpha=2.0 * r, **kwargs).attach(model)
    generator = torch.Generator().manual_seed(7)
    for matrix in adapter_parameters(model).values():
        matrix.data += noise * torch.randn(matrix.shape, generator=generator, dtype=torch.float64).to(matrix.dtype)
    return model


KNOWN = ("llama", "gpt2", "gpt_neox", "gpt_neo")
