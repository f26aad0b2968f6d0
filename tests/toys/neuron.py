"""The neuron-level regulariser written from the formulas, and the comparison with it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from toys.models import (
    answer_model,
    batch,
    norm,
)
from toys.regularizers import LR, Split, trained

from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.objectives.ssiuu import SSIUU
from lightning_ssiuu.regularizers import NeuronAttributionRegularizer

WEIGHT = 3e4


LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def watched(hf: nn.Module, names: Sequence[str], some: dict[str, Tensor], row: int) -> tuple[Tensor, int, Any, Any]:
    """Log P of one example alone, its number of tokens, outputs of modules, and zeros that were added to them."""
    n = int(some["attention_mask"][row].sum())
    ids, labels = some["input_ids"][row : row + 1, :n], some["labels"][row]
    outputs, zeros, handles = {}, {}, []

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            outputs[name], zeros[name] = output, torch.zeros_like(output, requires_grad=True)
            return output + zeros[name]

        return add

    for name in names:
        handles.append(hf.get_submodule(name).register_forward_hook(hook(name)))
    logps = hf(input_ids=ids).logits[0].log_softmax(-1)
    for handle in handles:
        handle.remove()
    where = [k for k in range(n) if labels[k] != -100]
    return torch.stack([logps[k - 1, ids[0, k]] for k in where]).sum(), len(where), outputs, zeros


KINDS = {"tokens": "min", "target": "sequence"}


class Reference:
    """The penalty's gradient by the formulas; the attributions of a step are those of the examples, added up."""

    def __init__(self, hf: nn.Module, names: Sequence[str], tokens: str, target: str = "sequence") -> None:
        self.hf, self.names, self.tokens, self.target = copy.deepcopy(hf), names, tokens, target
        self.before: Tensor | None = None

    def terms(self, some: dict[str, Tensor], row: int) -> list[tuple[Tensor, float]]:
        """Per neuron what A is the product sum of: (value with graph, constant)."""
        logp, n, outputs, zeros = watched(self.hf, self.names, some, row)
        probability = (logp if self.target == "sequence" else logp / n).exp()
        gradients = torch.autograd.grad(probability, [zeros[name] for name in self.names], retain_graph=True)
        last = max(k for k in range(some["labels"].shape[1]) if some["labels"][row, k] != -100)
        terms = []
        for name, gradient in zip(self.names, gradients, strict=True):
            output = outputs[name][0]
            for i in range(output.shape[1]):
                products = [output[k, i].item() * gradient[0, k, i].item() for k in range(last)]
                if self.tokens == "min":
                    k = products.index(min(products))
                    terms.append((output[k, i], float(gradient[0, k, i])))
                else:
                    terms.append(((output[:last, i] * gradient[0, :last, i]).sum(), 1.0))
        return terms

    def penalty(self, parts: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        """Without λ; zero in the first step."""
        rows = [self.terms(some, row) for some in parts for row in range(len(some["input_ids"]))]
        now = torch.tensor([sum(float(t[0].detach()) * t[1] for t in one) for one in zip(*rows, strict=True)])
        parameters = list(self.hf.parameters())
        before, self.before = self.before, now
        if before is None:
            return [torch.zeros_like(p) for p in parameters]
        growth = [float(a - b) if a < 0 else 0.0 for a, b in zip(now, before, strict=True)]
        total = sum(2 * g * value * factor for one in rows for g, (value, factor) in zip(growth, one, strict=True))
        return list(torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True))


def names(model: AnswerModel, inner: Sequence[str] = LLAMA, layers: Sequence[int] = (0, 1)) -> list[str]:
    return [f"model.layers.{layer}.{name}" for layer in layers for name in inner]


def compared(
    accumulate: int = 1, inner: Sequence[str] = LLAMA, layers: Sequence[int] = (0, 1), **options: Any
) -> tuple[list[float], list[float]]:
    """Per step the error of what was added to the gradient, and its size next to the objective's."""
    torch.set_default_dtype(torch.float64)
    try:
        model = answer_model()
        reference = Reference(model.hf, names(model, inner, layers), *(options.get(k, d) for k, d in KINDS.items()))
        weight = WEIGHT if reference.target == "sequence" else 300.0
        module = SSIUU(regularizer=NeuronAttributionRegularizer(weight, **options))
        steps = 3
        batches, split = [batch(n) for n in range(steps * accumulate)], Split()
        log = trained(module, model, batches, steps, callbacks=[split], accumulate_grad_batches=accumulate)
        errors, shares = [], []
        for step, (own, both) in enumerate(zip(split.seen, log, strict=True)):
            parts = [one["forget"] for one in batches[step * accumulate : (step + 1) * accumulate]]
            expected = [weight * p for p in reference.penalty(parts)]
            added = [b - a for a, b in zip(own, both, strict=True)]
            errors.append(norm([a - e for a, e in zip(added, expected, strict=True)]) / norm(both))
            shares.append(norm(expected) / norm(own))
            with torch.no_grad():
                for p, g in zip(reference.hf.parameters(), both, strict=True):
                    p -= LR * g
        return errors, shares
    finally:
        torch.set_default_dtype(torch.float32)
