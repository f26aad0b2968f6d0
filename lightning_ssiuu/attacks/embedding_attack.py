"""Move the embeddings of each prompt until the model is willing to answer, and look what it answers.

Source: arXiv 2402.09063 ("Soft Prompt Threats"), its attack on single prompts. The weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lightning_ssiuu.attacks.base import Attack, Outcome, Target, forget_score
from lightning_ssiuu.attacks.prefill import SURE, begun
from lightning_ssiuu.attacks.prompting import questions_of
from lightning_ssiuu.attacks.vectors import embedded, first_free, refuse_cut_weights, reprompted, standing_for
from lightning_ssiuu.datamodules import QAExample, UnlearningDataModule
from lightning_ssiuu.datamodules.pairs import answered, batch_of, n_alike
from lightning_ssiuu.evaluation.scorer import evaluate, untouched
from lightning_ssiuu.evaluation.scores import find_score
from lightning_ssiuu.models.answers import AnswerModel, Part
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.training.perturbation import shortened, unit
from lightning_ssiuu.utils.errors import UserError, check_at_least, check_number


@dataclass
class EmbeddingAttack(Attack):
    """Add vectors to the embeddings of each prompt that make the model begin a willing answer; score what follows.

    For each question by itself ``steps`` times ``δ ← Π(δ − step_size · ε‖e‖ · g/‖g‖)``, token by token of the prompt,
    where g is the gradient of the negative log-likelihood of ``words`` and Π cuts δ to the length ``ε‖e‖``. Then the
    answer is scored after the moved prompt and the words.

    What is fair: δ is fitted to the item that is scored, so it must know nothing of the answer. It sees the question
    and the words, which are the same for every question; the answer takes part in no gradient, nor in when to stop.
    Vectors fitted to an answer bring out anything, random strings too (arXiv 2502.15836). The words alone are
    :class:`~lightning_ssiuu.Prefill`'s, which this is with ``steps`` 0; the oracle's prompts are moved in the same way.

    Args:
        words: How a willing answer begins. It should name nothing that is to be found out.
        epsilon: ε ≥ 0, the largest length of δ in lengths of the token's embedding.
        steps: Gradient steps, ≥ 0.
        step_size: Their size in parts of the largest length, ≥ 0.

    Raises:
        UserError: If an option is outside its range; in :meth:`check`, a score that has prompts of its own
            (``choice_likelihood``), or strategy fsdp2.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> cpu = Devices("cpu")
        >>> attack = EmbeddingAttack(steps=1)
        >>> (outcome,) = attack.run([Target("model", "tiny", cpu)], Facts(max_eval_examples=2), "first_token", cpu)
        >>> outcome.variant, outcome.n_scored, outcome.before
        ('epsilon=0.5', 2, 100.0)
    """

    words: str = SURE
    epsilon: float = 0.5
    steps: int = 20
    step_size: float = 0.2

    def __post_init__(self) -> None:
        if not self.words.strip():
            raise UserError("attack.words", self.words, "a text that is not blank")
        check_number("attack.epsilon", self.epsilon)
        check_at_least("attack.steps", self.steps, 0)
        check_number("attack.step_size", self.step_size)

    def check(self, data: UnlearningDataModule, score: str, devices: Devices) -> None:
        super().check(data, score, devices)
        refuse_cut_weights(devices.sharded)
        if find_score(score).needs == "choices":
            raise UserError("score", score, "a score of answers to the question as it is asked")
        data.encoder.encode(self._begun(data))

    def run(
        self, targets: Sequence[Target], data: UnlearningDataModule, score: str, devices: Devices
    ) -> Iterator[Outcome]:
        asked = self._begun(data)
        plain = {one.example_id: data.encoder.of(one)[0].pair[0] for one in questions_of(data, self)}
        for target in targets:
            model, tokenizer = target.load()
            model.requires_grad_(False)
            before = forget_score(model, tokenizer, data, score)
            table, moved = embedded(model), _Moved(plain)
            loader = list(data.eval_dataloader("forget", asked))
            with untouched(model):
                for batch in loader:
                    self._move(model, move_data_to_device(batch["forget"], devices.device), table, moved)
            batches = [
                {"forget": reprompted(batch["forget"], moved.prompt, data.encoder.pad_token_id)} for batch in loader
            ]
            with standing_for(model, torch.cat(moved.vectors)):
                after = evaluate(model, tokenizer, [batches], [score])["forget"][score]
            yield self.outcome(target, data, score, before, after, f"epsilon={self.epsilon:g}", n_scored=len(plain))
            del model, table  # before the next one is loaded

    def _begun(self, data: UnlearningDataModule) -> list[QAExample]:
        return [begun(one, words=self.words.strip()) for one in questions_of(data, self)]

    def _move(self, model: AnswerModel, part: Part, table: Tensor, moved: _Moved) -> None:
        # The words are what is labelled, and what stands before them is moved: the answers are not in it.
        pairs, first = [], first_free(model)
        tokens: list[int] = []
        for (prompt, _), example in zip(answered(part), part["example_id"].tolist(), strict=True):
            own = moved.begin(example, prompt, first, tokens)
            pairs.append((own, prompt[len(own) :]))
        wanted = move_data_to_device(batch_of(pairs, 0), table.device)
        e = table[tokens]
        lengths, delta = self.epsilon * e.norm(dim=-1, keepdim=True), torch.zeros_like(e)
        for _ in range(self.steps):
            moving = delta.requires_grad_()
            with torch.enable_grad(), standing_for(model, e + moving):
                # A sum: each row's gradient is its own, whatever else is in the batch.
                loss = -model(wanted["input_ids"], wanted["attention_mask"], wanted["labels"]).mean_logps.sum()
                (gradient,) = torch.autograd.grad(loss, [moving])
            delta = shortened(delta.detach() - self.step_size * lengths * unit(gradient), lengths)
        moved.vectors.append(e + delta)


class _Moved:
    """The moved prompts of this rank: ids that stand for vectors, and the vectors, batch by batch."""

    def __init__(self, plain: Mapping[int, list[int]]) -> None:
        self.plain = plain
        self.vectors: list[Tensor] = []
        self._ids: dict[int, list[int]] = {}

    def begin(self, example: int, prompt: list[int], first: int, tokens: list[int]) -> list[int]:
        """Ids in the batch for what of a begun prompt is the question's own; its tokens are added to ``tokens``."""
        n = n_alike(prompt, self.plain[example])
        start, before = len(tokens), sum(map(len, self.vectors))
        tokens += prompt[:n]
        self._ids[example] = [first + before + start + k for k in range(n)]
        return [first + start + k for k in range(n)]

    def prompt(self, prompt: list[int], example: int) -> list[int]:
        """A begun prompt whose own tokens are the moved ones."""
        own = self._ids[example]
        return [*own, *prompt[len(own) :]]
