"""CIR: unlearn with weight gradients from which what the whole forget set has in common is projected out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lightning_ssiuu.evaluation.scorer import untouched
from lightning_ssiuu.models.answers import AnswerModel, Part, input_positions
from lightning_ssiuu.models.architectures import feed_forward_sites, neuron_sites
from lightning_ssiuu.models.packing import apart
from lightning_ssiuu.objectives.backbone import check_reads_part_alone
from lightning_ssiuu.objectives.base import UnlearningModule
from lightning_ssiuu.objectives.gradient_difference import gradient_difference_like
from lightning_ssiuu.training.shards import train_only, wide
from lightning_ssiuu.utils.errors import UserError, check_at_least

if TYPE_CHECKING:  # with it comes torch's compiler
    from transformers import PreTrainedModel


class CollapsedObjective(UnlearningModule):
    """An objective whose forget gradients leave out common directions, as :class:`CIR` has it; write its loss."""

    can_be_backbone = False
    state_attributes: ClassVar[tuple[str, ...]] = (
        "bases",
        "_epoch_of_bases",
    )  # in the middle of an epoch the weights would give others

    def __init__(
        self, input_components: int, gradient_components: int, attention: bool, every_n_epochs: int, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_at_least("input_components", input_components, 0)
        check_at_least("gradient_components", gradient_components, 0)
        check_at_least("every_n_epochs", every_n_epochs, 1)
        if self.lora is not None:
            raise UserError("lora", "adapters", "null: the gradient of an adapter is no sum of a layer's own g aᵀ")
        if self.gradient_checkpointing:
            raise UserError("gradient_checkpointing", True, "false: layers are recomputed without the projection")
        self.input_components, self.gradient_components = input_components, gradient_components
        self.attention, self.every_n_epochs = attention, every_n_epochs
        self.bases: Bases = {}
        self._epoch_of_bases: int | None = None

    def loss_to_collapse(self, batch: Part) -> Tensor:
        """The forget loss (scalar, nats), whose weight gradients are collapsed."""
        raise NotImplementedError(f"{type(self).__name__} has to define loss_to_collapse(batch)")

    def adopt(self, model: AnswerModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().adopt(model, tokenizer)
        train_only(model.hf, {f"{name}.weight" for name in linear_layers(model.hf, self.attention)})

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Not in on_train_epoch_start: Lightning leaves that out in a run resumed at the very end of an epoch.
        epoch = self.current_epoch  # a resumed run may have brought this epoch's directions
        if self._epoch_of_bases is not None and epoch < self._epoch_of_bases + self.every_n_epochs:
            return
        names = linear_layers(self.model.hf, self.attention)
        counts = self.input_components, self.gradient_components
        with untouched(self.model), self.trainer.precision_plugin.forward_context():
            parts = self.training_parts("forget")
            self.bases = find_common_directions(self.model, self.loss_to_collapse, parts, names, *counts)
        self._epoch_of_bases = epoch

    def forget_loss(self, batch: Part) -> Tensor:
        """The loss's value; its gradient is without the common directions once training has begun."""
        with collapsed(self.model.hf, self.bases):
            # A copy, as the step remembers passes by part: the regulariser's gradient is to be of an ordinary one.
            return self.loss_to_collapse(dict(batch))

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self.bases = {name: (a.to(self.device), g.to(self.device)) for name, (a, g) in self.bases.items()}


class CIR(CollapsedObjective):
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
        backbone: An objective whose losses and weights are used, and whose forget loss is of the forget answers alone;
            None takes gradient difference.
        input_components: Principal components of the inputs to project out, ≥ 0 and at most a quarter of the width
            (more would leave small models no gradient); 0 leaves the inputs, mean included, as they are.
        gradient_components: The same of the output gradients.
        attention: Train attention's projections too.
        every_n_epochs: How often the directions are taken again, ≥ 1.

    Raises:
        UserError: If weights are frozen (``lora``: an adapter's gradient is no sum of ``g aᵀ`` of the layer), or
            activations are recomputed (``gradient_checkpointing``: without the projection).

    Example:
        >>> CIR(input_components=8).gradient_components
        36
    """

    def __init__(
        self,
        backbone: UnlearningModule | None = None,
        input_components: int = 24,
        gradient_components: int = 36,
        attention: bool = False,
        every_n_epochs: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_components, gradient_components, attention, every_n_epochs, **kwargs)
        self.use_backbone(backbone or gradient_difference_like(self))
        check_reads_part_alone(self)

    def loss_to_collapse(self, batch: Part) -> Tensor:
        return UnlearningModule.forget_loss(self, batch)


#: Directions whose singular value is below this share of the largest are noise of the arithmetic.
_RANK_TOLERANCE = 1e-5


def common_directions(rows: Tensor, components: int) -> Tensor:
    """Mean and leading principal components of ``rows`` ``[T, D]`` as an orthonormal basis ``[K, D]`` in float64.

    ``K ≤ components + 1``: at most D/4 components are taken, and no more than there are; 0 gives an empty basis,
    without the mean. Source: Sondej & Yang, arXiv 2509.11816 (and its code), which projects the mean out and then one
    component after the other; here out of the space they span together, the same where they are orthogonal.
    """
    rows = rows.double()
    if components == 0 or not rows.any():
        return rows.new_zeros(0, rows.shape[1])
    mean = rows.mean(0)
    _, size, directions = torch.linalg.svd(rows - mean, full_matrices=False)
    counted = int((size > _RANK_TOLERANCE * rows.norm()).sum())
    directions = directions[: min(components, counted, rows.shape[1] // 4)]
    mean = mean - directions.T @ (directions @ mean)
    if mean.norm() > _RANK_TOLERANCE * rows.norm() / len(rows) ** 0.5:
        directions = torch.cat([(mean / mean.norm()).unsqueeze(0), directions])
    return directions


def without(rows: Tensor, basis: Tensor) -> Tensor:
    """Vectors ``[T, D]`` less their part in the space of an orthonormal basis ``[K, D]``."""
    basis = basis.to(rows)
    return rows - rows @ basis.T @ basis if len(basis) else rows


class CollapsedLinear(torch.autograd.Function):
    """``y = x Wᵀ + b`` whose weight gradient is ``Σ_t g̃_t ã_tᵀ``, without common directions; all else as usual.

    As a part of autograd's own graph the changed gradient is averaged over ranks, sharded and accumulated as the usual
    one is. Source: Sondej & Yang, arXiv 2509.11816: ``a`` the layer's input, ``g`` the gradient of its output, the
    tilde what :func:`without` leaves of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        input_basis: Tensor,
        gradient_basis: Tensor,
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight, input_basis, gradient_basis)
        ctx.transposed = transposed
        return torch.nn.functional.linear(inputs, weight.T if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, input_basis, gradient_basis = ctx.saved_tensors
        (gradient,) = gradients
        of_inputs = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            matrix = weight.T if ctx.transposed else weight
            of_inputs = (gradient @ matrix.to(gradient.dtype)).to(inputs.dtype)
        rows = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(weight.dtype, torch.float32)
            seen = without(inputs.reshape(-1, inputs.shape[-1]).to(wide), input_basis)
            pushed = without(rows.to(wide), gradient_basis)
            of_weight = (seen.T @ pushed if ctx.transposed else pushed.T @ seen).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_inputs, of_weight, of_bias, None, None, None


#: By name of a linear layer an orthonormal basis ``[K, in]`` for its inputs and one ``[K', out]`` for its gradients.
Bases = dict[str, tuple[Tensor, Tensor]]


def linear_layers(hf: PreTrainedModel, attention: bool = False) -> list[str]:
    """Names of the feed-forward projections whose weights train, on request also attention's."""
    sites = neuron_sites(hf) if attention else feed_forward_sites(hf)
    names = dict.fromkeys(site.module_name for site in sites)  # a fused projection has several kinds
    return [name for name in names if cast(Tensor, hf.get_submodule(name).weight).requires_grad]


@contextmanager
def collapsed(hf: PreTrainedModel, bases: Bases) -> Iterator[None]:
    """Inside, forward passes build a graph whose weight gradients leave the bases' directions out.

    Nothing else about the layers changes, and nothing of it stays, also after an exception.
    """
    layers: list[Any] = [hf.get_submodule(name) for name in bases]
    try:
        for layer, (of_inputs, of_gradients) in zip(layers, bases.values(), strict=True):
            layer.forward = partial(_collapsed_forward, layer, of_inputs, of_gradients)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def find_common_directions(
    model: AnswerModel, loss: Callable[[Part], Tensor], parts: Iterable[Part], names: list[str], n_in: int, n_out: int
) -> Bases:
    """Means and principal components of what goes into linear layers, and of the gradients of what comes out.

    ``loss`` is a mean over a part's sequences, ``n_in`` and ``n_out`` are as in :func:`common_directions`. Tokens that
    are no input to a prediction do not count; each sequence weighs the same, however the batches are cut. The bases are
    on the model's device; its ``.grad`` fields and hooks are as before on return, also after an exception. Meanwhile
    the host's memory holds all inputs and gradients.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    pushed: dict[str, list[Tensor]] = {name: [] for name in names}
    for part in parts:
        mask = input_positions(part["attention_mask"], part["labels"])
        with torch.enable_grad(), _watched(model, names, mask, seen, pushed) as start:
            total = loss(part) * len(mask)
            torch.autograd.grad(total, start)  # of the embeddings' output alone: no parameter's .grad is touched
    device = next(model.parameters()).device

    def basis(rows: list[Tensor], components: int) -> Tensor:
        return common_directions(torch.cat(rows), components).to(device)

    return {name: (basis(seen.pop(name), n_in), basis(pushed.pop(name), n_out)) for name in names}


@contextmanager
def _watched(
    model: AnswerModel, names: list[str], mask: Tensor, seen: dict[str, list[Tensor]], pushed: dict[str, list[Tensor]]
) -> Iterator[list[Tensor]]:
    start: list[Tensor] = []

    def begin(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        start.append(output.detach().requires_grad_(True))
        return start[-1]

    def watch(name: str, _module: nn.Module, args: Any, output: Tensor) -> None:
        packing = model.packing
        seen[name].append(wide(apart(args[0], packing))[mask].cpu())
        output.register_hook(lambda gradient: pushed[name].append(wide(apart(gradient, packing))[mask].cpu()))

    with ExitStack() as hooks:
        hooks.enter_context(model.hf.get_input_embeddings().register_forward_hook(begin))
        for name in names:
            hooks.enter_context(model.hf.get_submodule(name).register_forward_hook(partial(watch, name)))
        yield start


def _collapsed_forward(layer: Any, of_inputs: Tensor, of_gradients: Tensor, inputs: Tensor) -> Tensor:
    transposed = isinstance(layer, Conv1D)
    return CollapsedLinear.apply(inputs, layer.weight, layer.bias, of_inputs, of_gradients, transposed)
