"""Objectives inside the network, LAT and MCU: example by example, with modules in the place of hooks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys.data import byte_tokenizer
from toys.losses import log_probability, mean, predictions, projector_by_hand
from toys.models import answer_model, distance, part, weights
from toys.runs import first_batch, first_gradients, toy_data, toy_model

from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.objectives.lat import LAT
from lightning_ssiuu.objectives.mcu import MCU
from lightning_ssiuu.objectives.npo import NPO
from lightning_ssiuu.regularizers import AttributionRegularizer
from lightning_ssiuu.utils.errors import UserError

UNEQUAL = part([(3, 1), (5, 2), (2, 4)], seed=3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_SSIUU_CACHE", str(tmp_path / "cache"))


def rows_of(some: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    found = []
    for row in range(len(some["labels"])):
        n = int(some["attention_mask"][row].sum())
        found.append({name: some[name][row : row + 1, :n] for name in ("input_ids", "attention_mask", "labels")})
    return found


# ---- LAT -----------------------------------------------------------------------------------------------------------


class Nudged(nn.Module):
    """A block, and what is added behind it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.delta: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.block(*args, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
        self.seen = hidden.detach()
        moved = hidden if self.delta is None else hidden + self.delta
        return (moved, *out[1:]) if isinstance(out, tuple) else moved


def adversarial_nll(hf: Any, blocks: Any, one: dict[str, Tensor], layers: list[int], options: dict[str, Any]) -> Tensor:
    """Of one example, at the hidden states its adversary finds."""
    nudged = {layer: Nudged(blocks[layer]) for layer in layers}
    for layer, module in nudged.items():
        blocks[layer] = module

    def nll() -> Tensor:
        (tokens,) = predictions(hf, one)
        return -log_probability(tokens) / len(tokens)

    nll()
    longest = {layer: options["epsilon"] * module.seen.norm(dim=-1) for layer, module in nudged.items()}
    for module in nudged.values():
        module.delta = torch.zeros_like(module.seen).requires_grad_()
    for _ in range(options["steps"]):
        gradients = torch.autograd.grad(nll(), [module.delta for module in nudged.values()])
        for (layer, module), gradient in zip(nudged.items(), gradients, strict=True):
            moved = module.delta.detach().clone()
            for token in range(moved.shape[1]):
                g = gradient[0, token]
                if g.norm() > 0:  # what no answer depends on stays
                    moved[0, token] -= options["step_size"] * longest[layer][0, token] * g / g.norm()
                if moved[0, token].norm() > longest[layer][0, token]:
                    moved[0, token] *= longest[layer][0, token] / moved[0, token].norm()
            module.delta = moved.requires_grad_()
    for module in nudged.values():
        module.delta = module.delta.detach()
    value = nll()
    for layer, module in nudged.items():
        blocks[layer] = module.block
    return value


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("layers", [[0], None])
def test_lat_by_hand(name: str, layers: Any) -> None:
    options: dict[str, Any] = {"epsilon": 0.3, "steps": 3, "step_size": 0.7}
    module = LAT(layers=layers, **options)
    module.adopt(answer_model(name).train(), byte_tokenizer())
    parameters = list(module.model.parameters())
    loss = module.forget_loss(UNEQUAL)
    ours = torch.autograd.grad(loss, parameters)
    hf: Any = copy.deepcopy(module.model.hf)
    blocks = hf.model.layers if name == "llama" else hf.gpt_neox.layers
    chosen = [0, 1] if layers is None else layers
    by_hand = mean([-adversarial_nll(hf, blocks, one, chosen, options) for one in rows_of(UNEQUAL)])
    theirs = torch.autograd.grad(by_hand, list(hf.parameters()))
    assert abs(loss - by_hand).item() < 1e-10
    assert distance(ours, theirs) < 1e-8
    undisturbed = mean([log_probability(tokens) / len(tokens) for tokens in predictions(hf, UNEQUAL)])
    assert loss > undisturbed + 0.05  # minus the negative log-likelihood: the adversary brings the answers up
    assert not any(m._forward_hooks for m in module.model.modules())


@pytest.mark.parametrize("options", [{"epsilon": 0.0}, {"steps": 0}])
def test_without_an_adversary_lat_is_the_backbone(options: dict[str, Any], tmp_path: Path) -> None:
    ours = first_gradients(LAT(retain_weight=2.0, **options), tmp_path / "a")
    theirs = first_gradients(GradientDifference(retain_weight=2.0), tmp_path / "b")
    assert distance(list(ours.values()), list(theirs.values())) < 1e-14


def test_a_weak_adversary_is_almost_none(tmp_path: Path) -> None:
    """The difference goes with ε: ten times the radius, ten times the distance."""
    backbone = first_gradients(LAT(NPO(beta=0.5), epsilon=0.0), tmp_path / "a")
    far, near = (
        distance(list(first_gradients(LAT(NPO(beta=0.5), epsilon=e), tmp_path / f"{e}").values()), [*backbone.values()])
        for e in (1e-3, 1e-4)
    )
    assert 1e-6 < near < 1e-2
    assert far / near == pytest.approx(10.0, rel=0.1)


def test_the_retain_loss_and_the_regulariser_see_no_adversary(tmp_path: Path) -> None:
    ours = first_gradients(LAT(forget_weight=0.0), tmp_path / "a")
    theirs = first_gradients(GradientDifference(forget_weight=0.0), tmp_path / "b")
    assert distance(list(ours.values()), list(theirs.values())) < 1e-14
    anchors = []
    for number, module in enumerate((LAT(), GradientDifference())):
        module.regularizer = AttributionRegularizer(1.0, "relative")
        first_gradients(module, tmp_path / f"{number}")
        anchors.append(module.regularizer.state()["anchor"])
    assert distance(list(anchors[0].values()), list(anchors[1].values())) < 1e-12


@pytest.mark.parametrize("objective", [LAT, MCU])
def test_blocks_that_are_not_there_are_refused(objective: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"layers: got \[7\], allowed: blocks of this model: 0 to 1, or null"):
        first_gradients(objective(layers=[7]), tmp_path)


# ---- MCU -----------------------------------------------------------------------------------------------------------


def outputs_of(hf: Any, some: dict[str, Tensor], layers: list[int]) -> list[list[Tensor]]:
    """By example and block, the whole feed-forward network's output at the positions that predict answer tokens."""
    found = []
    for one in rows_of(some):
        seen: list[Tensor] = []
        handles = [
            hf.model.layers[n].mlp.register_forward_hook(lambda *call, s=seen: s.append(call[-1])) for n in layers
        ]
        hf(input_ids=one["input_ids"])
        for handle in handles:
            handle.remove()
        where = [k - 1 for k, label in enumerate(one["labels"][0].tolist()) if label != -100]
        found.append([output[0, where] for output in seen])
    return found


@pytest.mark.parametrize("components", [0, 2])
@pytest.mark.parametrize("layers", [[0], [0, 1]])
def test_mcu_by_hand(components: int, layers: list[int], tmp_path: Path) -> None:
    """The first step, at a model that has moved away from the original."""
    floor, data = 0.3, toy_data()
    options: dict[str, Any] = {"input_components": 0, "gradient_components": 0, "floor": floor, "layers": layers}
    module = MCU(output_components=components, retain_weight=0.0, **options)
    original: Any = toy_model().hf
    moved: Any = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in moved.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)

    def move(*_: Any) -> None:  # once the original was looked at
        module.model.hf.load_state_dict(moved.state_dict())

    prepare = module.prepare
    module.prepare = lambda: (prepare(), move())  # type: ignore[method-assign]
    ours = first_gradients(module, tmp_path)

    data.setup("fit")
    loader = data.train_dataloader()
    dataset: Any = loader.dataset
    everything = loader.collate_fn([dataset["forget", i] for i in range(5)])["forget"]
    all_rows = [torch.cat(rows) for rows in zip(*outputs_of(original, everything, layers), strict=True)]
    kept = [
        torch.eye(rows.shape[1], dtype=rows.dtype)
        - (projector_by_hand(rows.detach(), components) if components else 0.0)
        for rows in all_rows
    ]
    lengths = [(rows @ k).norm(dim=1).mean().item() for rows, k in zip(all_rows, kept, strict=True)]
    one = first_batch()["forget"]
    pairs = zip(outputs_of(moved, one, layers), outputs_of(original, one, layers), strict=True)
    per_example, floored, counted = [], 0, 0
    for now, then in pairs:
        total: Any = 0.0
        for o, o0, k, c in zip(now, then, kept, lengths, strict=True):
            products = ((o @ k) * (o0.detach() @ k)).sum(1) / c**2
            floored, counted = floored + int((products < floor).sum()), counted + len(products)
            total = total + torch.stack([max(p, torch.tensor(floor, dtype=p.dtype)) for p in products]).mean()
        per_example.append(total / len(layers))
    assert 0 < floored < counted
    names = [name for name, _ in moved.named_parameters() if name in ours]
    theirs = torch.autograd.grad(mean(per_example), [moved.get_parameter(name) for name in names])
    assert len(names) == 3 * (max(layers) + 1)
    assert distance([ours[name] for name in names], theirs) < 1e-9


def test_the_original_is_as_far_from_breaking_as_can_be(tmp_path: Path) -> None:
    """⟨ô₀, ô₀⟩ over the squared mean length is at least 1 on average over all positions alike."""
    module = MCU(output_components=2, layers=[0, 1])
    first_gradients(module, tmp_path, steps=1)
    assert module.trainer.callback_metrics["train/forget_loss"] > 0.5


def test_what_leads_in_the_outputs_is_left_alone(tmp_path: Path) -> None:
    """An output that moves along the common directions alone costs nothing."""
    module = MCU(output_components=2, layers=[1])
    first_gradients(module, tmp_path)
    (name,), (basis,) = module.output_modules, module.output_bases.values()
    batch = first_batch()["forget"]
    before = module.loss_to_collapse(batch).item()
    start, projection = weights(module), module.model.hf.get_submodule(name)
    shift = torch.randn(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        projection.weight.add_(torch.outer(basis[0] + basis[-1], shift))  # type: ignore[operator]
    assert distance(weights(module), start) > 0.1
    assert module.loss_to_collapse(batch).item() == pytest.approx(before, abs=1e-10)
    with torch.no_grad():
        projection.weight.add_(torch.outer(torch.ones(16, dtype=torch.float64), shift))  # type: ignore[operator]
    assert abs(module.loss_to_collapse(batch).item() - before) > 1e-3
