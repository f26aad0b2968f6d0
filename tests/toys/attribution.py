"""What the tests of several attribution methods share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import NeuronSite


@contextmanager
def scaled(model: AnswerModel, site: NeuronSite, neuron: int, token: int, factor: float) -> Iterator[None]:
    """Multiply one neuron's activation at one token."""
    column = neuron if site.columns is None else int(site.columns[neuron])

    def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, token, column] *= factor
        return output

    handle = model.hf.get_submodule(site.module_name).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def hooks(model: nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


def mixed_modes(model: nn.Module) -> list[bool]:
    """Evaluation here, training there: as after freezing one block's dropout."""
    model.train()
    model.hf.model.layers[0].eval()
    return [module.training for module in model.modules()]


class Broken(nn.Module):
    """Fails in the forward or in the backward pass."""

    def __init__(self, inner: nn.Module, backward: bool) -> None:
        super().__init__()
        self.inner, self.backward = inner, backward

    def forward(self, x: Tensor) -> Tensor:
        if not self.backward:
            raise ZeroDivisionError
        out = self.inner(x)
        out.register_hook(self.fail)
        return out

    def fail(self, gradient: Tensor) -> None:
        raise ZeroDivisionError
