"""Plant inhibitory neurons in a healthy model by hand, to check that flags find them and nothing else.

What unlearning is suspected of is done here on purpose: a neuron is rewired so that it fires on the forget prompts and
works against their answers. Everything else in the model stays, so it is known which neurons hide the answer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ssiuu.models.answers import AnswerModel, Part, Target, input_positions, target_logps
from lightning_ssiuu.models.architectures import Kind, NeuronSite, neuron_sites
from lightning_ssiuu.models.loading import evaluation_mode
from lightning_ssiuu.models.packing import padded
from lightning_ssiuu.utils.errors import UserError

#: What can be planted: a hidden unit (gate and up rows, down column), a value channel (row, attn_o columns), or
#: only the incoming weights of one query, key or output neuron.
PLANTED_KINDS: tuple[Kind, ...] = ("mlp_up", "attn_v", "attn_q", "attn_k", "attn_o", "mlp_down")


@dataclass(frozen=True, eq=False)
class PlantedUnit:
    """A rewired unit.

    Args:
        kind: One of :data:`PLANTED_KINDS`; ``mlp_up`` stands for a whole hidden unit.
        layer: Block number, from 0.
        index: Which neuron of its site.
        strength: As asked for.
        neurons: ``(kind, layer, index)`` of the neurons whose flag is right: gate and up of a hidden unit, else one.
        edits: New values: parameter of ``model.hf``, axis (0 row, 1 column), index, values.
    """

    kind: Kind
    layer: int
    index: int
    strength: float
    neurons: frozenset[tuple[str, int, int]]
    edits: tuple[tuple[str, int, int, Tensor], ...]

    def write(self, model: AnswerModel) -> None:
        """Put the unit into a model."""
        parameters = dict(model.hf.named_parameters())
        with torch.no_grad():
            for name, axis, index, values in self.edits:
                parameters[name].select(axis, index).copy_(values)


def with_units(model: AnswerModel, units: Iterable[PlantedUnit]) -> AnswerModel:
    """A copy of the model that holds the units."""
    planted = copy.deepcopy(model)
    for unit in units:
        unit.write(planted)
    return planted


def mean_probability(model: AnswerModel, part: Part, target: Target = "length_normalised") -> float:
    """Mean over examples of the answers' probability, in [0, 1]."""
    with torch.inference_mode(), evaluation_mode(model):
        answers = model(part["input_ids"], part["attention_mask"], part["labels"])
        return target_logps(answers, target).double().exp().mean().item()


class Planter:
    """Rewires units of a model against a forget part's answers, sparing a retain part's.

    Args:
        model: Healthy model with separate projections in the layout of Llama; it is not changed.
        forget: ``input_ids, attention_mask, labels``, each ``[B, L]``.
        retain: The same.

    Raises:
        UserError: If the architecture shares one matrix between query, key and value, or has no gate.

    Example:
        >>> from lightning_ssiuu.models.loading import load_model
        >>> model = AnswerModel(load_model("tiny"))
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> part = {"input_ids": ids, "attention_mask": ids * 0 + 1, "labels": torch.tensor([[-100, -100, 7, 8]])}
        >>> planter = Planter(model, part, part | {"input_ids": torch.tensor([[9, 4, 7, 8]])})
        >>> unit = planter.unit("mlp_up", layer=1, strength=0.5, generator=torch.Generator().manual_seed(0))
        >>> sorted(unit.neurons) == [("mlp_gate", 1, unit.index), ("mlp_up", 1, unit.index)]
        True
        >>> mean_probability(with_units(model, [unit]), part) < mean_probability(model, part)
        True
    """

    def __init__(self, model: AnswerModel, forget: Part, retain: Part) -> None:
        self.model = model
        self.sites: dict[tuple[int, str], NeuronSite] = {site.key: site for site in neuron_sites(model.hf)}
        if any(site.columns is not None for site in self.sites.values()) or (0, "mlp_gate") not in self.sites:
            raise UserError("model", model.hf.config.model_type, "an architecture in the layout of Llama")
        self._forget, self._retain = _States(model, forget, self.sites), _States(model, retain, self.sites)

    def unit(
        self, kind: Kind, layer: int, strength: float, generator: torch.Generator, harmless: bool = False
    ) -> PlantedUnit:
        """Rewire one unit.

        Args:
            kind: One of :data:`PLANTED_KINDS`.
            layer: Block number, from 0.
            strength: What it adds where it fires: for units that write into the residual stream, its part of the
                stream's norm; for query and key neurons, multiples of fifty times the neurons' usual size.
            generator: Chooses which unit, and the random direction.
            harmless: Make a decoy: as large a change, in a random direction that does nothing to first order.
        """
        if kind not in PLANTED_KINDS:
            raise UserError("kind", kind, f"one of {list(PLANTED_KINDS)}")
        if kind == "mlp_up":
            return self._hidden(layer, strength, generator, harmless)
        if kind == "attn_v":
            return self._value(layer, strength, generator, harmless)
        return self._row(kind, layer, strength, generator, harmless)

    def _hidden(self, layer: int, strength: float, generator: torch.Generator, harmless: bool) -> PlantedUnit:
        index = _random_index(self.sites[layer, "mlp_up"].width, generator)
        # ±1 on forget and retain: the gate is open on forget prompts alone, where the unit is silu(4)·1.
        detector = self._detector((layer, "mlp_up"), -1.0)
        column = self._against(layer, "mlp_down", generator, harmless) * (strength / 3.93)
        edits = (
            (self._weight(layer, "mlp_gate"), 0, index, 4 * detector),
            (self._weight(layer, "mlp_up"), 0, index, detector),
            (self._weight(layer, "mlp_down"), 1, index, column),
        )
        neurons = frozenset({("mlp_gate", layer, index), ("mlp_up", layer, index)})
        return PlantedUnit("mlp_up", layer, index, strength, neurons, edits)

    def _value(self, layer: int, strength: float, generator: torch.Generator, harmless: bool) -> PlantedUnit:
        config = self.model.hf.config
        width = self.sites[layer, "attn_v"].width
        size = self._forget.inputs[layer, "attn_o"].shape[-1] // config.num_attention_heads
        readers = config.num_attention_heads * size // width
        index = _random_index(width, generator)
        column = self._against(layer, "attn_o", generator, harmless) * (strength / readers)
        first = index // size * readers
        outputs = [(first + head) * size + index % size for head in range(readers)]
        edits = [(self._weight(layer, "attn_v"), 0, index, self._detector((layer, "attn_v"), 0.0, everywhere=True))]
        edits += [(self._weight(layer, "attn_o"), 1, output, column) for output in outputs]
        return PlantedUnit("attn_v", layer, index, strength, frozenset({("attn_v", layer, index)}), tuple(edits))

    def _row(self, kind: Kind, layer: int, strength: float, generator: torch.Generator, harmless: bool) -> PlantedUnit:
        key = (layer, kind)
        gradient = self._forget.mean_gradient(key, everywhere=kind == "attn_k")
        # One of the neurons the answers hang on most; for a decoy, one of those they hang on least.
        order = gradient.abs().argsort(descending=not harmless)
        index = int(order[_random_index(max(8, len(order) // 50), generator)])
        if kind in ("attn_q", "attn_k"):
            size = 50 * self._forget.outputs[key].square().mean().sqrt()
        else:
            size = self._forget.stream[layer, kind]
        detector = self._detector(key, 0.0, everywhere=kind == "attn_k")
        name = self._weight(layer, kind)
        row = self.model.hf.get_parameter(name).detach()[index] - strength * size * gradient[index].sign() * detector
        return PlantedUnit(kind, layer, index, strength, frozenset({(kind, layer, index)}), ((name, 0, index, row),))

    def _weight(self, layer: int, kind: str) -> str:
        return f"{self.sites[layer, kind].module_name}.weight"

    def _detector(self, key: tuple[int, str], elsewhere: float, everywhere: bool = False) -> Tensor:
        """Weights that give 1 on forget prompts and ``elsewhere`` on retain prompts (ridge regression)."""
        positive, negative = (states.at(states.inputs[key], everywhere) for states in (self._forget, self._retain))
        inputs = torch.cat([positive, negative])
        wanted = torch.cat([torch.ones(len(positive)), torch.full((len(negative),), elsewhere)]).to(inputs)
        gram = inputs.T @ inputs
        ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
        return torch.linalg.solve(gram + ridge, inputs.T @ wanted)

    def _against(self, layer: int, kind: Kind, generator: torch.Generator, harmless: bool) -> Tensor:
        """Direction against the forget answers and across the retain answers, as long as the residual stream."""
        key = (layer, kind)
        forget, retain = self._forget.mean_gradient(key), self._retain.mean_gradient(key)
        direction = -forget
        if harmless:
            direction = torch.randn(len(forget), generator=generator).to(forget)
            direction = direction - (direction @ forget) / (forget @ forget) * forget
        direction = direction - (direction @ retain) / (retain @ retain) * retain
        return direction / direction.norm() * self._forget.stream[key]


class _States:
    """Inputs, outputs and output gradients of all sites' modules, from one pass."""

    def __init__(self, model: AnswerModel, part: Part, sites: Mapping[tuple[int, str], NeuronSite]) -> None:
        self.inputs: dict[tuple[int, str], Tensor] = {}
        self.outputs: dict[tuple[int, str], Tensor] = {}
        self.gradients: dict[tuple[int, str], Tensor] = {}
        #: Mean norm of the residual stream where a layer's attention and feed-forward network write into it.
        self.stream: dict[tuple[int, str], Tensor] = {}
        labels = part["labels"]
        self._answer = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
        self._inside = input_positions(part["attention_mask"], labels)
        handles = [model.hf.get_submodule(s.module_name).register_forward_hook(self._keep(k)) for k, s in sites.items()]
        try:
            with torch.enable_grad(), evaluation_mode(model), padded(model):
                answers = model(part["input_ids"], part["attention_mask"], labels)
                outputs = list(self.outputs.values())
                gradients = torch.autograd.grad(target_logps(answers, "length_normalised").sum(), outputs)
            self.gradients = dict(zip(self.outputs, gradients, strict=True))
            with torch.no_grad():
                states = model.hf(
                    input_ids=part["input_ids"], attention_mask=part["attention_mask"], output_hidden_states=True
                ).hidden_states
        finally:
            for handle in handles:
                handle.remove()
        self.outputs = {key: value.detach() for key, value in self.outputs.items()}
        for layer, kind in self.outputs:
            self.stream[layer, kind] = self.at(states[layer], False).norm(dim=-1).mean()

    def _keep(self, key: tuple[int, str]) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                self.inputs[key], self.outputs[key] = args[0].detach(), output

        return hook

    def at(self, values: Tensor, everywhere: bool) -> Tensor:
        """``[N, width]`` at the positions that predict answer tokens, or at all that feed them."""
        return values[self._inside if everywhere else self._answer]

    def mean_gradient(self, key: tuple[int, str], everywhere: bool = False) -> Tensor:
        """``[width]`` mean gradient of the answers' log-probability."""
        return self.at(self.gradients[key], everywhere).mean(0)


def _random_index(width: int, generator: torch.Generator) -> int:
    return int(torch.randint(width, (), generator=generator))


def found_and_right(
    flagged: Sequence[tuple[str, int, int]], costs: Mapping[PlantedUnit, float], least: float = 0.1
) -> dict[str, float]:
    """Recall and precision over neurons, in [0, 1] (NaN where there is nothing to find, or nothing was flagged).

    Args:
        flagged: ``(kind, layer, index)``.
        costs: Of each planted unit or decoy: share of the answers' probability that it takes.
        least: Units that cost at least this are to be found; any other neuron is wrong to flag, also a weak unit's.

    Example:
        >>> unit = PlantedUnit("attn_v", 0, 3, 1.0, frozenset({("attn_v", 0, 3)}), ())
        >>> found_and_right([("attn_v", 0, 3), ("attn_q", 0, 1)], {unit: 0.5})
        {'to_find': 1, 'found': 1, 'flagged': 2, 'recall': 1.0, 'precision': 0.5}
    """
    wanted = {neuron for unit, cost in costs.items() if cost >= least for neuron in unit.neurons}
    hits = len(wanted & set(flagged))
    return {
        "to_find": len(wanted),
        "found": hits,
        "flagged": len(flagged),
        "recall": hits / len(wanted) if wanted else float("nan"),
        "precision": hits / len(flagged) if flagged else float("nan"),
    }
