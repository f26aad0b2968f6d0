"""Everything an audit measures on a model while it is loaded: each is loaded once for it, and alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.attribution.activation_gradient import AttributionMethod
from lightning_ssiuu.attribution.diagnosis import Examined, examine_model
from lightning_ssiuu.attribution.logit_lens import layer_logps, prefers_answer
from lightning_ssiuu.attribution.weight_change import OwnChange, OwnFlag, own_change, own_flags, site_weights
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.evaluation.chance import chance_of, first_batches
from lightning_ssiuu.evaluation.knowledge import knowledge, retained
from lightning_ssiuu.evaluation.loaders import first_parts
from lightning_ssiuu.evaluation.metrics.base import first_of_each
from lightning_ssiuu.evaluation.predictions import Predictions
from lightning_ssiuu.evaluation.retention import Retention
from lightning_ssiuu.evaluation.scorer import untouched
from lightning_ssiuu.evaluation.scores import SCORES
from lightning_ssiuu.models.answers import AnswerModel, Target
from lightning_ssiuu.models.architectures import neuron_sites
from lightning_ssiuu.models.loading import load_tokenizer
from lightning_ssiuu.reports.audit.verdict import Forgetting
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.distributed import gathered
from lightning_ssiuu.utils.errors import naming

#: Forget examples shown with ``show_text``.
SHOWN_EXAMPLES = 12
#: Measured of the forget set unasked: a mean may hide a single answer that is still known.
HIGHEST = "highest_probability"


@dataclass
class Findings:
    """What was measured, by the model's name.

    ``chance`` is the forget score without any knowledge, in percent, for where there is no oracle; ``doubt`` says why
    the original does not know the forget set as it is asked, if it does not; ``retain_chance`` is a score of the retain
    set and what it is worth without any knowledge, None where that is not known. ``own`` are flags by
    what the unlearned model's own changed weights cost. ``lens`` has per layer the mean log-probability per token of
    the true answer (``"answer"``) and of a wrong one (``"distractor"``), in nats, and how often the true one is
    preferred (``"accuracy"``, percent). ``answers`` are greedy answers by the example's id.
    """

    examined: dict[str, Examined] = field(default_factory=dict)
    chance: float = 0.0
    doubt: str = ""
    retain_chance: tuple[str, float] | None = None
    own: list[OwnFlag] | None = None
    lens: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    answers: dict[str, dict[int, str]] = field(default_factory=dict)

    def forgetting(self, score: str) -> Forgetting:
        """What happened to the forget score, and its floor: the oracle's score, else chance."""
        scores = {name: model.scores["forget"][score] for name, model in self.examined.items()}
        floor = (scores["oracle"], "the oracle's") if "oracle" in scores else (self.chance, "chance")
        return Forgetting(score, scores["original"], scores["unlearned"], *floor, self.doubt)

    def retention(self, data: UnlearningDataModule, model: str = "unlearned") -> Retention | None:
        """What a score of the retain set is with a model; None without one, or where no level by chance is known."""
        if self.retain_chance is None or model not in self.examined:
            return None
        score, chance = self.retain_chance
        before, after = (self.examined[name].scores["retain"][score] for name in ("original", model))
        return Retention(score, before, after, chance, data.n_scored("retain"))

    def examples(self, data: UnlearningDataModule) -> list[dict[str, Any]]:
        """The shown examples with both models' answers; empty unless asked for."""
        if not self.answers:
            return []
        shown = [example for example in data.splits.forget if example.example_id in self.answers["original"]]
        return [
            {"example_id": example.name, "question": example.question, "answer": example.answer}
            | {name: self.answers[name][example.example_id] for name in ("original", "unlearned")}
            for example in shown
        ]


def measure(
    checkpoints: Mapping[str, str],
    data: UnlearningDataModule,
    devices: Devices,
    probe_examples: int,
    target: Target,
    scores: Sequence[str] | None,
    score: str,
    alpha: float = 1e-3,
    own: bool = True,
    show_text: bool = False,
    method: AttributionMethod | None = None,
) -> Findings:
    """Load one model after the other (``"original"``, then ``"unlearned"``, at least) and measure.

    ``score`` is that of the verdict, measured besides ``scores``. Flagging neurons by their ``own`` change keeps the
    original's weights in main memory; it is never done on weights that are cut over devices.
    """
    findings, weights = Findings(), dict[str, Tensor]()
    also = list(dict.fromkeys([score, forced_score(score), *([HIGHEST] if scores is None else [])]))
    for name, checkpoint in tqdm(checkpoints.items(), desc="audit", unit="model", disable=not devices.is_first):
        with naming(name):
            model, tokenizer = devices.load(checkpoint, unchanged=True), load_tokenizer(checkpoint)
            findings.examined[name] = examine_model(
                model, tokenizer, data, probe_examples, target, scores, also, method
            )
        measured = findings.examined[name].scores
        if scores is None and score != HIGHEST:
            for split in set(measured) - {"forget"}:
                del measured[split][HIGHEST]
        if name == "original":
            by_chance = chance_of(score, model, tokenizer, data.eval_dataloader("forget"), others=retained(data))
            findings.chance = by_chance or 0.0
            known = knowledge(score, model, tokenizer, data, measured["forget"][score], by_chance)
            findings.doubt = (known and known.doubt()) or ""
            findings.retain_chance = _retain_chance(score, model, tokenizer, data, measured["retain"])
        if not devices.sharded:
            if lens := answer_lens(model, data):
                findings.lens[name] = lens
            if own and name == "original":
                weights = site_weights(model, neuron_sites(model.hf))
            if own and name == "unlearned":
                findings.own, weights = _own_flags(model, weights, data, probe_examples, target, alpha), {}
        if show_text and name in ("original", "unlearned"):
            findings.answers[name] = forget_answers(model, tokenizer, data, max(SHOWN_EXAMPLES, devices.n_ranks))
        del model
    return findings


def _own_flags(
    model: AnswerModel,
    original: Mapping[str, Tensor],
    data: UnlearningDataModule,
    probe_examples: int,
    target: Target,
    alpha: float,
) -> list[OwnFlag]:
    def change(split: str) -> OwnChange:
        part = first_parts(data.eval_dataloader(split), split, probe_examples)
        return own_change(model, original, part, neuron_sites(model.hf), target).over_ranks()

    forget = change("forget")
    # The retain set only raises the threshold: where no unit costs the minimum, it is not asked.
    return own_flags(forget, change("retain"), alpha) if forget.costs() else []


def _retain_chance(
    score: str,
    model: AnswerModel,
    tokenizer: PreTrainedTokenizerBase,
    data: UnlearningDataModule,
    measured: Mapping[str, float],
) -> tuple[str, float] | None:
    batches = first_batches(data.eval_dataloader("retain"))
    for name in (score, "probability"):
        if name in measured and (chance := chance_of(name, model, tokenizer, batches)) is not None:
            return name, chance
    return None


def answer_lens(model: AnswerModel, data: UnlearningDataModule) -> dict[str, list[float]]:
    """The forget answers as they stand after every layer, see :class:`Findings`; empty without distractors."""
    device = next(model.parameters()).device
    columns: list[Tensor] = []
    for batch in data.eval_dataloader("forget"):
        if "options" not in batch["forget"]:
            return {}
        options = move_data_to_device(batch["forget"]["options"], device)
        # The true answer and the distractor beside it; no other is looked at.
        true = first_of_each(options["option_of"])
        pair = true | (~true & true.roll(1))
        length = int(options["attention_mask"][pair].sum(1).max())
        names = ("input_ids", "attention_mask", "labels")
        logps = layer_logps(model, {name: options[name][pair, :length] for name in names})
        preferred = 100 * prefers_answer(logps, options["option_of"][pair]).double()
        columns.append(torch.stack([logps[:, 0::2].double(), logps[:, 1::2].double(), preferred]).cpu())
    means = torch.cat([share for rank in gathered(columns) for share in rank], 2).mean(2).tolist()
    return dict(zip(("answer", "distractor", "accuracy"), means, strict=True))


def forced_score(score: str) -> str:
    """The score by which undoing neurons is judged: the verdict's, or probability where that generates text."""
    return "probability" if SCORES[score].generates else score


@torch.no_grad()
def forget_answers(
    model: AnswerModel, tokenizer: PreTrainedTokenizerBase, data: UnlearningDataModule, n_examples: int
) -> dict[int, str]:
    """Greedy answers to the first forget questions, by example id, on every rank."""
    device = next(model.parameters()).device
    answers: dict[int, str] = {}
    with untouched(model):
        for batch in data.eval_dataloader("forget", data.splits.forget[:n_examples]):
            part = move_data_to_device(batch["forget"], device)
            texts = Predictions(model, tokenizer, part).generations
            answers |= dict(zip(part["example_id"].tolist(), texts, strict=True))
    return {example: text for share in gathered(answers) for example, text in share.items()}
