"""Generate with vLLM instead of transformers: the extra ``[vllm]``, for saved checkpoints on one CUDA device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from lightning_ssiuu.models.generation import Request
from lightning_ssiuu.models.loading import adapter_base, hub_options
from lightning_ssiuu.utils.errors import Given, NotFinite, UserError
from lightning_ssiuu.utils.extras import check_extra

#: Of the memory that is free when it starts, beside the model that is loaded for everything else.
_SHARE_OF_FREE = 0.9


class VLLM:
    """Continues prompts as a saved checkpoint would; started when the first ones come, ended with this object.

    Greedy texts are those of transformers but for rounding. Sampled ones are drawn by vLLM itself, from the same
    distribution and by a seed of each sample's own, so they are other ones.

    Args:
        checkpoint: See :func:`~lightning_ssiuu.models.loading.resolve_checkpoint`.
        dtype: Of the weights.
        device: That vLLM shares with the loaded model.

    Raises:
        UserError: If vLLM is not installed, or, once it starts, cannot run this model.
    """

    def __init__(self, checkpoint: str, dtype: torch.dtype, device: torch.device) -> None:
        check_installed()
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device

    def continued(self, requests: Sequence[Request]) -> list[list[int]]:
        """Token ids of the continuations, in the order of the requests."""
        import vllm

        prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
        outputs = self._llm.generate(prompts, [_parameters(vllm, request) for request in requests], use_tqdm=False)
        texts = [output.outputs[0] for output in outputs]
        if not all(math.isfinite(text.cumulative_logprob) for text in texts):
            given = Given("a model whose predictions are NaN or infinite")
            raise NotFinite(
                "checkpoint", given, "one that gives finite numbers; weights in float32 (precision 32-true)"
            )
        return [list(text.token_ids)[: request.limit] for text, request in zip(texts, requests, strict=True)]

    @cached_property
    def _llm(self) -> Any:
        import vllm

        options: dict[str, Any] = {}
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            options["gpu_memory_utilization"] = _SHARE_OF_FREE * free / total
        if adapter_base(self.checkpoint) is not None:
            raise UserError(
                "engine", "vllm", "transformers with a directory of adapters, which is merged when it is loaded"
            )
        model, revision = hub_options(self.checkpoint)
        try:
            return vllm.LLM(
                model=model,
                dtype=str(self.dtype).removeprefix("torch."),
                skip_tokenizer_init=True,  # prompts are token ids already
                trust_remote_code=False,
                seed=0,
                **options,
                **revision,
            )
        except Exception as error:
            allowed = f"transformers, or a model that vllm can run here ({type(error).__name__}: {error})"
            raise UserError("engine", "vllm", allowed) from error


def check_installed() -> None:
    """Check that vLLM is there, without importing it."""
    check_extra("vllm", "engine", "vllm", "transformers")


def _parameters(vllm: Any, request: Request) -> Any:
    options: dict[str, Any] = {"temperature": 0.0}
    if (draw := request.draw) is not None:
        options = {"temperature": draw.temperature, "top_p": 1.0 if draw.top_p is None else draw.top_p}
        options["seed"] = draw.seed()
    return vllm.SamplingParams(
        max_tokens=max(1, request.limit),
        stop_token_ids=list(request.ends),
        ignore_eos=True,  # the ends are those of the request alone, not what is stored with the checkpoint
        logprobs=0,  # of the chosen tokens: whether they are numbers
        detokenize=False,
        **options,
    )
