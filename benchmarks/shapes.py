"""Llama models by size: their configurations, and random weights for what does not depend on what a model knows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_ssiuu.models.answers import AnswerModel


def _shape(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int, tied: bool) -> dict:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


#: ``toy`` to ``100m`` for CPUs, then the published ones (meta-llama/Llama-3.2-1B, -3.2-3B, -3.1-8B, -3.1-70B).
SHAPES: dict[str, dict[str, Any]] = {
    "toy": _shape(64, 2, 4, 2, 128, 1024, True),
    "1m": _shape(128, 4, 4, 2, 384, 1024, True),
    "5m": _shape(256, 6, 4, 2, 768, 2048, True),
    "20m": _shape(512, 6, 8, 4, 1536, 8192, True),
    "50m": _shape(640, 10, 10, 5, 1792, 16384, True),
    "135m": _shape(576, 30, 9, 3, 1536, 49152, True),
    "1b": _shape(2048, 16, 32, 8, 8192, 128256, True),
    "3b": _shape(3072, 28, 24, 8, 8192, 128256, True),
    "8b": _shape(4096, 32, 32, 8, 14336, 128256, False),
    "70b": _shape(8192, 80, 64, 8, 28672, 128256, False),
}


def llama_config(shape: str) -> LlamaConfig:
    """The configuration of a size in :data:`SHAPES`."""
    return LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        use_cache=False,
    )


def random_llama(
    shape: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> AnswerModel:
    """A model with random weights, made where it will be used: 3 B of them take minutes on a CPU."""
    torch.manual_seed(seed)
    with torch.device(device):
        return AnswerModel(AutoModelForCausalLM.from_config(llama_config(shape), dtype=dtype)).train()
