"""Ablation: what the answer's probability loses when one neuron is set to zero. Slow, and no approximation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_ssiuu.attribution.activation_gradient import streamed
from lightning_ssiuu.attribution.aggregation import NeuronAttribution
from lightning_ssiuu.attribution.micro_batches import parse_bytes, pass_bytes
from lightning_ssiuu.models.answers import AnswerModel, Target, input_positions, target_logps
from lightning_ssiuu.models.architectures import NeuronSite
from lightning_ssiuu.models.packing import padded
from lightning_ssiuu.utils.errors import UserError, check_at_least, check_choice

Tokens = Literal["all", "each"]


def ablation_attribution(
    model: AnswerModel,
    parts: Iterable[Mapping[str, Tensor]],
    sites: Sequence[NeuronSite],
    target: Target = "sequence",
    memory_budget: int | str | None = None,
    tokens: Tokens = "all",
    rows: int = 512,
) -> NeuronAttribution:
    """Attribute the answers' probability by setting neurons to zero, one at a time: ground truth for small models.

    - ``tokens="all"``: the neuron is zero at every token. ``A[i] = F(x) − F(x; h[i, ·] = 0)``, one value per
      example, its maximum as well as its minimum over tokens.
    - ``tokens="each"``: at one token after the other. ``A[i, k] = F(x) − F(x; h[i, k] = 0)``, of which activation ×
      gradient is the first-order term; as many times slower as there are tokens.

    An example is repeated for many neurons in one forward pass, once per neuron (and token), ``rows`` times at most,
    and less often where ``memory_budget`` says so. A single neuron moves P little, in float32 often less than rounding
    does: a float64 model tells more. Not for weights sharded over ranks, which would have to make equally many passes.
    """
    check_choice("tokens", tokens, Tokens)
    check_at_least("rows", rows, 1)
    budget = None if memory_budget is None else parse_bytes(memory_budget)

    def attribute(part: Mapping[str, Tensor], result: NeuronAttribution) -> None:
        for row, mask in enumerate(part["attention_mask"]):
            length = int(mask.nonzero()[-1]) + 1
            example = {name: values[row : row + 1, :length] for name, values in part.items()}
            positions = input_positions(example["attention_mask"], example["labels"])[0].nonzero().flatten()
            with torch.no_grad():
                own = target_logps(model(**example), target).double()
                n_rows = _rows_within(budget, rows, model, sites, example)
                places = [None] if tokens == "all" else positions.tolist()
                after = {site.key: _without(model, example, site, places, target, n_rows) for site in sites}
            _add(result, sites, own, after, target)
            result.count(own)

    with torch.no_grad(), padded(model):  # row by row another neuron is set to zero
        return streamed(model, parts, sites, attribute)


def _add(
    result: NeuronAttribution,
    sites: Sequence[NeuronSite],
    own: Tensor,
    after: Mapping[tuple[int, str], Tensor],
    target: Target,
) -> None:
    # ``after`` holds [tokens, width] log F without each neuron.
    highest = own
    if target != "log_probability":
        highest = torch.stack([own[0], *(values.max() for values in after.values())]).max().unsqueeze(0)
    factors = result.factors(torch.zeros_like(own) if target == "log_probability" else highest)
    for site in sites:
        without = after[site.key]
        if target == "log_probability":
            lost = own - without
        else:
            change = without - own
            # The first form is exact where little changes, the second does not overflow where much does.
            little, much = (own - highest).exp() * -torch.expm1(change.clamp(max=1)), -(without - highest).exp()
            lost = torch.where(change < 1, little, much + (own - highest).exp())
        result.add_site(site, lost.amax(0, keepdim=True), lost.amin(0, keepdim=True), factors)


def _rows_within(
    budget: int | None, rows: int, model: AnswerModel, sites: Sequence[NeuronSite], example: Mapping[str, Tensor]
) -> int:
    if budget is None:
        return rows
    length, labels = example["input_ids"].shape[1], int((example["labels"] != -100).sum())
    # What a pass takes is linear in its rows.
    first, second = (pass_bytes(model.hf, sites, n, length, n * labels, gradients=False) for n in (1, 2))
    if first > budget:
        raise UserError("memory_budget", budget, f"at least {first:,} bytes, what an example of {length} tokens needs")
    return min(rows, 1 + (budget - first) // (second - first))


def _without(
    model: AnswerModel,
    example: Mapping[str, Tensor],
    site: NeuronSite,
    positions: Sequence[int | None],
    target: Target,
    n_rows: int,
) -> Tensor:
    # ``[len(positions), width]`` log F with each neuron set to zero, at a position or (None) at all of them
    columns = site.columns if site.columns is not None else torch.arange(site.width)
    pairs = [(column, position) for position in positions for column in columns.tolist()]
    logps = []
    for first in range(0, len(pairs), n_rows):
        chunk = pairs[first : first + n_rows]
        repeated = {name: values.expand(len(chunk), -1) for name, values in example.items()}
        with model.hf.get_submodule(site.module_name).register_forward_hook(partial(_zero, chunk)):
            logps.append(target_logps(model(**repeated), target).double())
    return torch.cat(logps).view(len(positions), site.width)


def _zero(pairs: Sequence[tuple[int, int | None]], _module: nn.Module, _args: object, output: Tensor) -> Tensor:
    # In row r of a pass, neuron and position r of the pairs.
    device = output.device
    row, column = torch.arange(len(pairs), device=device), torch.tensor([c for c, _ in pairs], device=device)
    output = output.clone()
    if pairs[0][1] is None:
        output[row, :, column] = 0
    else:
        output[row, torch.tensor([k for _, k in pairs], device=device), column] = 0
    return output
