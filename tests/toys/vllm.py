"""What of vLLM's interface the package uses, as of vLLM 0.33, with transformers' generate behind it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM


@dataclass
class SamplingParams:
    """Those of vLLM that are given by name here, with its defaults and checks."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self) -> None:
        if not (0 <= self.temperature <= 2 and 0 < self.top_p <= 1):
            raise ValueError("temperature must be in [0, 2], top_p in (0, 1]")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError("max_tokens must be at least 1")
        if self.temperature == 0 and self.n > 1:
            raise ValueError("n must be 1 when using greedy sampling")


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


@dataclass
class Calls:
    """What was asked of the engine."""

    models: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    parameters: list[SamplingParams] = field(default_factory=list)
    #: Raised instead of starting.
    refusal: Exception | None = None
    #: Multiplies the weights.
    scale: float = 1.0


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Make ``import vllm`` find the stand-in."""
    calls = Calls()

    class LLM:
        def __init__(
            self,
            model: str,
            *,
            skip_tokenizer_init: bool = False,
            trust_remote_code: bool = False,
            dtype: str = "auto",
            seed: int = 0,
            gpu_memory_utilization: float = 0.92,
        ) -> None:
            if calls.refusal is not None:
                raise calls.refusal
            calls.models.append({"model": model, "dtype": dtype})
            assert skip_tokenizer_init
            assert not trust_remote_code
            options = {"dtype": getattr(torch, dtype), "use_safetensors": True}
            self._model = AutoModelForCausalLM.from_pretrained(model, **options).eval()
            for parameter in self._model.parameters():
                parameter.data *= calls.scale

        def generate(
            self, prompts: Sequence[Mapping[str, Any]], sampling_params: Sequence[SamplingParams], *, use_tqdm: bool
        ) -> list[RequestOutput]:
            return [self._one(list(p["prompt_token_ids"]), s) for p, s in zip(prompts, sampling_params, strict=True)]

        @torch.no_grad()
        def _one(self, prompt: list[int], how: SamplingParams) -> RequestOutput:
            calls.prompts.append(prompt)
            calls.parameters.append(how)
            assert how.n == 1
            assert not how.detokenize
            ids = torch.tensor([prompt])
            stored = self._model.generation_config.eos_token_id
            ends = [*(how.stop_token_ids or []), *([] if how.ignore_eos or stored is None else [stored])]
            options: dict[str, Any] = {"do_sample": False}
            if how.temperature:
                options = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
            with torch.random.fork_rng():
                torch.manual_seed(how.seed or 0)
                out = self._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=how.max_tokens,
                    eos_token_id=ends,
                    pad_token_id=0,
                    output_logits=True,
                    return_dict_in_generate=True,
                    repetition_penalty=1.0,
                    **options,
                )
            new = out.sequences[0, len(prompt) :].tolist()
            chosen = [logits.log_softmax(-1)[0, token].item() for logits, token in zip(out.logits, new, strict=True)]
            total = None if how.logprobs is None else math.fsum(chosen)
            return RequestOutput(prompt, [CompletionOutput(0, "", tuple(new), total)])

    module: Any = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    return calls
