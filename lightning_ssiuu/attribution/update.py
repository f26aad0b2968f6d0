"""What an update of the weights is like: its size, how spread it is, and its direction beside the forget gradients.

An update is Δ = θ' − θ, the difference of an unlearned model's weights and the original's. Gradients of single examples
are kept as sketches (random signs, coordinates summed in ``size`` places), which keep inner products: exactly where a
model has no more than ``size`` weights, else up to about ``1 / √size`` of the norms (arXiv 0902.2206).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ssiuu.models.answers import AnswerModel, Part
from lightning_ssiuu.models.loading import evaluation_mode
from lightning_ssiuu.training.shards import square, wide
from lightning_ssiuu.utils.errors import UserError

Weights = Mapping[str, Tensor]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of all floating-point parameters by name, each tied one once."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.is_floating_point()}


def update_between(original: Weights, changed: Weights) -> dict[str, Tensor]:
    """Δ by name, in at least float32.

    Raises:
        UserError: If the two do not have the same parameters.
    """
    if {name: t.shape for name, t in original.items()} != {name: t.shape for name, t in changed.items()}:
        raise UserError("original", "weights of another model", "those of the model that was unlearned")
    return {name: wide(changed[name]) - wide(original[name]) for name in original}


def norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all tensors together."""
    return math.sqrt(square(list(tensors)))


def norms_by_kind(update: Weights) -> dict[str, float]:
    """Euclidean norm per kind of module: over all parameters of modules with one name, such as ``q_proj``.

    Example:
        >>> found = norms_by_kind({"h.0.up.weight": torch.tensor([3.0]), "h.1.up.bias": torch.tensor([4.0])})
        >>> found
        {'up': 5.0}
    """
    kinds: dict[str, list[Tensor]] = {}
    for name, tensor in update.items():
        kinds.setdefault((["", *name.split(".")])[-2], []).append(tensor)
    return {kind: norm(tensors) for kind, tensors in kinds.items()}


class Sketch:
    """A linear map of all weights' values to ``size`` numbers that keeps inner products, up to about ``1 / √size``.

    Args:
        size: Numbers; a model with no more weights is only turned about.
        seed: Of the signs.
    """

    def __init__(self, size: int = 1 << 16, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        self._signs: list[Tensor] = []

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """``[size]`` in float32, of tensors of always the same shapes."""
        if not self._signs:
            generator = torch.Generator().manual_seed(self.seed)
            for tensor in tensors:
                bits = torch.randint(2, (tensor.numel(),), generator=generator, dtype=torch.int8)
                self._signs.append((2 * bits - 1).to(tensor.device))
        total, place = tensors[0].new_zeros(self.size, dtype=torch.float32), 0
        for tensor, signs in zip(tensors, self._signs, strict=True):
            signed = tensor.detach().float().flatten() * signs
            total += F.pad(signed, (place, -(place + len(signed)) % self.size)).view(-1, self.size).sum(0)
            place = (place + len(signed)) % self.size
        return total


def example_gradients(model: AnswerModel, parts: Iterable[Part], sketch: Sketch) -> Tensor:
    """Sketches ``[n, size]`` of every example's gradient of its answer's mean log-probability, on the CPU.

    One example at a time, in evaluation mode, with respect to all floating-point parameters; ``.grad`` is not touched.
    """
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    trained = [p.requires_grad for p in parameters]
    rows = []
    with evaluation_mode(model), torch.enable_grad():
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            for one in _single(parts, parameters[0].device):
                answers = model(one["input_ids"], one["attention_mask"], one["labels"])
                found = torch.autograd.grad(answers.mean_logps.sum(), parameters, materialize_grads=True)
                rows.append(sketch(found).cpu())
        finally:
            for parameter, was in zip(parameters, trained, strict=True):
                parameter.requires_grad_(was)
    return torch.stack(rows)


def mean_cosine(gradients: Tensor) -> float:
    """Mean cosine over all pairs of rows ``[n, size]``, n ≥ 2; a row of zeros has cosine 0 with every other.

    Example:
        >>> mean_cosine(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
        0.3333333333333333
    """
    units = F.normalize(gradients.double(), dim=1)
    pairs = units @ units.T
    return float((pairs.sum() - pairs.diagonal().sum()) / (len(units) * (len(units) - 1)))


def principal_share(update: Tensor, gradients: Tensor, n_directions: int) -> float:
    """Share of ``‖update‖²`` in the span of the gradients' first principal directions, in percent.

    The directions are the right singular vectors of ``gradients`` ``[n, size]``, not centred, of the largest singular
    values; ``update`` is a sketch ``[size]`` of the same map.

    Example:
        >>> gradients = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> [principal_share(torch.tensor([3.0, 0.0, 4.0]), gradients, k) for k in (1, 2)]
        [36.0, 36.0]
    """
    length = float(update.double().square().sum())
    if length == 0:
        return 0.0
    values, vectors = torch.linalg.eigh(gradients.double() @ gradients.double().T)
    kept = values[-n_directions:] > values[-1].clamp(min=0) * 1e-12
    values, vectors = values[-n_directions:][kept], vectors[:, -n_directions:][:, kept]
    along = vectors.T @ (gradients.double() @ update.double())
    return 100 * float((along.square() / values).sum()) / length


def _single(parts: Iterable[Part], device: torch.device) -> Iterator[Part]:
    for part in parts:
        for row in range(len(part["input_ids"])):
            yield {name: part[name][row : row + 1].to(device) for name in ("input_ids", "attention_mask", "labels")}
