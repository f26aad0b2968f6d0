"""Unlearning Depth Score: what is left of the answers in the hidden states, layer by layer, told by patching them.

Source: arXiv 2605.24614 ("Measuring the Depth of LLM Unlearning via Activation Patching"). The hidden states of a model
are put into the model from before unlearning, one layer at a time, where the answer is predicted. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lightning_ssiuu.attacks.base import Attack, Outcome, Target
from lightning_ssiuu.attacks.prompting import questions_of
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.datamodules.tokenization import is_end
from lightning_ssiuu.evaluation.runs import check_tokenizers, resolve_models
from lightning_ssiuu.evaluation.scorer import untouched
from lightning_ssiuu.models.answers import AnswerModel, Part
from lightning_ssiuu.models.hidden_states import answers_with_all_hidden, with_hidden
from lightning_ssiuu.models.loading import check_same_shape
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.distributed import gathered
from lightning_ssiuu.utils.errors import Given, UserError, check_number

_ORIGINAL = "attack.original"
#: The name of what is measured.
LEFT = "1 - UDS"


def erased_shares(missing: Tensor, lost: Tensor, threshold: float) -> Tensor:
    """The score of each example, in [0, 1]: 1 where its answer is as far from the hidden states as from the oracle's.

    ``UDS_i = Σ_l Δ1_l · clip(Δ2_l / Δ1_l, 0, 1) / Σ_l Δ1_l`` over the layers l with ``Δ1_l`` above the threshold.

    Args:
        missing: ``[n, layers]`` Δ1: mean log-probability per answer token (nats) that the original loses with the
            oracle's states.
        lost: ``[n, layers]`` Δ2: the same with the states of the model that is judged.
        threshold: Layers count where Δ1 is larger.

    Returns:
        ``[m]``, without the examples that have no such layer.

    Example:
        >>> missing = torch.tensor([[0.0, 1.0, 3.0], [0.0, 0.0, 0.01]])
        >>> lost = torch.tensor([[9.0, 2.0, 1.5], [1.0, 1.0, 1.0]])
        >>> erased_shares(missing, lost, 0.05)
        tensor([0.6250])
    """
    counts = missing > threshold
    weights = missing.where(counts, 0.0)
    ratios = (lost / missing.where(counts, 1.0)).clamp(0.0, 1.0)
    known = counts.any(1)
    return ((weights * ratios).sum(1) / weights.sum(1))[known]


@dataclass
class UnlearningDepth(Attack):
    """Patch each model's hidden states into the original, layer by layer, and see how much of the answer survives.

    Stage 1 puts the oracle's states into ``original``, stage 2 those of each model; the layers where the oracle's lower
    the answer's log-probability by more than ``threshold`` count (:func:`erased_shares`). The outcome is ``1 − UDS`` in
    percent, so that high means recoverable, as for all attacks: 0 for the oracle and 100 for the original, both by
    construction. Put in are the outputs of whole blocks, of all of them, where the answer's tokens are predicted from.

    Assumed, since the source speaks of spans of entities in longer answers: the span is the whole answer, without the
    token that ends it.

    The oracle has to be given. One model is in memory at a time; of all others the states at these places (layers ×
    tokens of all answers × width) are in main memory. The score given to ``attack`` is not used.

    Args:
        original: The model before unlearning; needed.
        threshold: τ ≥ 0, in nats per token; the source's.

    Raises:
        UserError: If an option is outside its range; when it runs, no oracle, models of other shapes, or no example
            whose answer the original loses with the oracle's states.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> cpu = Devices("cpu")
        >>> same = [Target("model", "tiny", cpu), Target("oracle", "tiny", cpu)]
        >>> UnlearningDepth("tiny").run(same, Facts(max_eval_examples=2), "probability", cpu)
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: oracle: got one that knows what the original does, allowed: one retrained without it
    """

    paths: ClassVar[tuple[str, ...]] = ("original",)

    original: str | None = None
    threshold: float = 0.05

    def __post_init__(self) -> None:
        check_number("attack.threshold", self.threshold)

    def check(self, data: UnlearningDataModule, score: str, devices: Devices) -> None:
        super().check(data, score, devices)
        questions_of(data, self)
        if self.original is None:
            raise UserError(_ORIGINAL, None, "the model before unlearning: a directory, a hub id or another checkpoint")
        resolve_models({_ORIGINAL: self.original})
        check_tokenizers({_ORIGINAL: self.original}, data)

    def run(self, targets: Sequence[Target], data: UnlearningDataModule, score: str, devices: Devices) -> list[Outcome]:
        if "oracle" not in [target.name for target in targets]:
            raise UserError("oracle", None, "a model retrained without the forget set: the depth is measured by its")
        check_same_shape({_ORIGINAL: str(self.original)} | {target.argument: target.checkpoint for target in targets})
        parts = [_without_end(batch["forget"], data) for batch in data.eval_dataloader("forget")]
        states = {target.name: _states(target, parts) for target in targets}
        lost = self._lost(Target(_ORIGINAL, str(self.original), devices), parts, states)
        found = []
        for target in targets:
            shares = erased_shares(lost["oracle"], lost[target.name], self.threshold)
            if not len(shares):
                given = Given("one that knows what the original does")
                raise UserError("oracle", given, "one retrained without it")
            left = 100 * (1 - float(shares.mean()))
            found.append(self.outcome(target, data, LEFT, 100.0, left, n_scored=len(shares)))
        return found

    @torch.no_grad()
    def _lost(
        self, original: Target, parts: Sequence[Part], states: dict[str, list[list[Tensor]]]
    ) -> dict[str, Tensor]:
        # By model ``[n, layers]`` nats per token that the original's answers lose with its states, of all ranks.
        model, _ = original.load()
        found: dict[str, list[Tensor]] = {name: [] for name in states}
        with untouched(model):
            for number, part in enumerate(parts):
                part = move_data_to_device(part, original.devices.device)
                own = _mean_logps(model, part)
                for name, several in states.items():
                    lost = []
                    for layer, hidden in enumerate(several[number]):
                        with with_hidden(model, part, layer, hidden):
                            lost.append(own - _mean_logps(model, part))
                    found[name].append(torch.stack(lost, 1))
        return {
            name: torch.cat([one for share in gathered(of_rank) for one in share]) for name, of_rank in found.items()
        }


@torch.no_grad()
def _states(target: Target, parts: Sequence[Part]) -> list[list[Tensor]]:
    model, _ = target.load()
    with untouched(model):
        passes = [answers_with_all_hidden(model, move_data_to_device(part, target.devices.device)) for part in parts]
    return [[state.cpu() for state in states] for _, states in passes]


def _mean_logps(model: AnswerModel, part: Part) -> Tensor:
    return model(part["input_ids"], part["attention_mask"], part["labels"]).mean_logps.double().cpu()


def _without_end(part: Part, data: UnlearningDataModule) -> dict[str, Any]:
    # Without a label on the token that ends an answer, unless it is all of it.
    labels = part["labels"].clone()
    for row in labels:
        places = (row != -100).nonzero().flatten().tolist()
        if len(places) > 1 and is_end(int(row[places[-1]]), data.tokenizer):
            row[places[-1]] = -100
    return {**{name: part[name] for name in ("input_ids", "attention_mask")}, "labels": labels}
