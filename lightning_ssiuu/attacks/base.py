"""What an attack is, what it leaves, and the rows of ``attack.json`` that attacks without training give."""

from __future__ import annotations

import gc
import json
import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.attacks.curves import RecoveryCurve, by_model, spread
from lightning_ssiuu.datamodules import QAExample, UnlearningDataModule
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.evaluation.scores import check_score
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_tokenizer
from lightning_ssiuu.training.devices import Devices, Engine
from lightning_ssiuu.utils.distributed import world_size
from lightning_ssiuu.utils.errors import UserError, naming

_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


@dataclass(frozen=True)
class Target:
    """A saved model to attack, by the argument it was given for (``"model"``, ``"oracle"``).

    The devices are launched before :meth:`load`. ``data`` is what the model is attacked with instead of the data module
    that it was unlearned with: of ``"control"``, the unlearned model under a relearning attack on invented facts.
    """

    argument: str
    checkpoint: str
    devices: Devices
    data: UnlearningDataModule | None = None

    @property
    def name(self) -> str:
        """Its name in the results: ``"unlearned"`` for ``"model"``, else that of the argument."""
        return "unlearned" if self.argument == "model" else self.argument

    def load(self, unchanged: bool = False) -> tuple[AnswerModel, PreTrainedTokenizerBase]:
        """Load the model and its tokenizer; errors name the argument. ``unchanged`` as :meth:`Devices.load` has it."""
        if self.devices.sharded:
            gc.collect()  # units of FSDP refer to each other, and two models at once may not fit
        with naming(self.argument):
            return self.devices.load(self.checkpoint, unchanged), load_tokenizer(self.checkpoint)


@dataclass
class Outcome:
    """One attack on one model, without any training; :meth:`Attack.outcome` makes it.

    Args:
        model: ``"unlearned"`` or ``"oracle"``.
        kind: The attack's class in snake case, e.g. ``"quantization"``.
        variant: Form of the attack, e.g. ``"8bit"``; None where there is only one.
        seed: 0 where nothing is random; for controls the number of the draw.
        n_scored: Number of questions.
        before: Score without the attack, percent.
        forget_score: Score under the attack, percent.
        control: Whether random neurons were changed instead of the flagged ones.
        n_neurons: How many neurons were changed; None for attacks that change none.
        score: What was measured: the score asked for, except where :mod:`~.sampling` counts answers given.
    """

    model: str
    kind: str
    variant: str | None
    seed: int
    n_scored: int
    before: float
    forget_score: float
    control: bool = False
    n_neurons: int | None = None
    score: str = field(kw_only=True)

    @property
    def cell(self) -> tuple[str | None, int, bool]:
        """What it is compared by with the other model's: variant, seed and whether it is a control."""
        return self.variant, self.seed, self.control


@dataclass
class Attack(ABC):
    """An attack on a saved model. Its options are dataclass fields; :meth:`run` is what it does.

    ``attack --attack my_attacks.Noise --attack.std 0.2`` runs your own and puts it into ``attack.json`` under its name.
    An attack that fine-tunes is a :class:`~lightning_ssiuu.Relearning` attack, which is swept and resumed.

    Example:
        >>> @dataclass
        ... class Noise(Attack):
        ...     std: float = 0.1
        ...     def run(self, targets, data, score, devices):
        ...         for target in targets:
        ...             model, tokenizer = target.load()
        ...             before = forget_score(model, tokenizer, data, score)
        ...             for parameter in model.parameters():
        ...                 parameter.data += self.std * parameter.data.std()
        ...             yield self.outcome(target, data, score, before, forget_score(model, tokenizer, data, score))
        >>> from lightning_ssiuu import Facts
        >>> cpu = Devices("cpu")
        >>> (outcome,) = Noise(std=0.0).run([Target("model", "tiny", cpu)], Facts(), "first_token", cpu)
        >>> outcome.kind, outcome.before, outcome.forget_score
        ('noise', 100.0, 100.0)
    """

    #: Options that hold paths: they are not shown in ``attack.json``.
    paths: ClassVar[tuple[str, ...]] = ()
    #: What :meth:`run` gives.
    gives: ClassVar[type[Outcome | RecoveryCurve]] = Outcome
    #: What may generate texts. vLLM reads checkpoints: only where all are of models as they are saved, which
    #: :meth:`run` then loads as ``unchanged``.
    engines: ClassVar[tuple[Engine, ...]] = ("transformers",)

    @property
    def kind(self) -> str:
        """The class's name in snake case: ``"kind"`` in ``attack.json``."""
        return _WORDS.sub("_", type(self).__name__).lower()

    @property
    def name(self) -> str:
        """The name of its entries in ``attack.json``; a later attack of this name replaces them."""
        return self.kind

    def options(self) -> dict[str, Any]:
        """All options as JSON values."""
        options = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return json.loads(json.dumps(options, default=_plain))

    def settings(self) -> dict[str, Any]:
        """The options written to ``attack.json``: no paths."""
        return {name: value for name, value in self.options().items() if name not in self.paths}

    def check(self, data: UnlearningDataModule, score: str, devices: Devices) -> None:
        """Raise a :class:`UserError` for whatever is wrong, before ``devices`` are launched and models are loaded."""
        check_score(score, "score")
        data.setup("validate")
        data.check_share(devices.n_ranks)

    @abstractmethod
    def run(
        self, targets: Sequence[Target], data: UnlearningDataModule, score: str, devices: Devices
    ) -> Iterable[Outcome | RecoveryCurve]:
        """Attack; the weights on disk and the data stay as they are.

        Args:
            targets: ``"unlearned"`` and perhaps ``"oracle"``, not loaded yet.
            data: The data module the model was unlearned with.
            score: Name of the forget score.
            devices: Launched; each rank scores its share of the questions and gets the outcome of all.

        Returns:
            An outcome for each model, variant and seed; of relearning a curve for each run.
        """

    def outcome(
        self,
        target: Target,
        data: UnlearningDataModule,
        score: str,
        before: float,
        after: float,
        variant: str | None = None,
        **more: Any,
    ) -> Outcome:
        """The :class:`Outcome` on one model from its scores without and under the attack, percent.

        ``more`` has ``seed``, ``control``, ``n_neurons``, or ``n_scored`` where that is not the whole forget set.
        """
        figures = {"seed": 0, "n_scored": data.n_scored("forget"), "before": before, "forget_score": after}
        return Outcome(target.name, self.kind, variant, **(figures | {"score": score} | more))

    def rows(self, results: Sequence[Any], score: str) -> list[dict[str, Any]]:
        """The rows of ``attack.json`` that sum up all that :meth:`run` gave."""
        return [row | {"attack": self.name} for row in outcome_rows(results)]


def checked(attack: Attack, given: Any, targets: Sequence[Target]) -> list[Any]:
    """What :meth:`Attack.run` gave, as a list.

    Raises:
        UserError: Not an iterable of the attack's own outcomes (or curves), or not the same ones for every target.
    """

    def refusal(wanted: str) -> UserError:
        return UserError("attack", attack.name, f"an attack whose run() gives {wanted}")

    wanted, kind = attack.gives, attack.kind
    if not isinstance(given, Iterable):
        raise refusal(f"{wanted.__name__} objects, not {type(given).__name__}")
    results = list(given)
    for result in results:
        if not isinstance(result, wanted):
            raise refusal(f"{wanted.__name__} objects alone, not {type(result).__name__}")
        if result.kind != kind:
            raise refusal(f"results of its own kind {kind!r}, not {result.kind!r}")
    names = [target.name for target in targets]
    if {result.model for result in results} != set(names):
        raise refusal(f"at least one {wanted.__name__} for each of {names}, and for no other model")
    # A sweep may go on with more learning rates for one model than for the other.
    several: Callable[[Iterable[Any]], Any] = set if wanted is RecoveryCurve else Counter
    cells = [several(result.cell for result in results if result.model == name) for name in names]
    if any(of_model != cells[0] for of_model in cells):
        label = "p and seeds" if wanted is RecoveryCurve else "variants, seeds and controls"
        raise refusal(f"the same {label} for each of {names}")
    if wanted is Outcome and {cell[0] for cell in cells[0]} != {cell[0] for cell in cells[0] if not cell[2]}:
        raise refusal("at least one outcome that is no control for every variant")
    return results


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def outcome_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row of ``attack.json`` for each variant: both models, the gap to the oracle seed by seed, and the control.

    ``control`` and ``n_neurons`` beside the models are the unlearned model's; the oracle's are inside ``oracle``.
    """
    rows = []
    for kind, variant in dict.fromkeys((outcome.kind, outcome.variant) for outcome in outcomes):
        own = [outcome for outcome in outcomes if (outcome.kind, outcome.variant) == (kind, variant)]
        row: dict[str, Any] = {"attack": kind, "kind": kind, "p": None, "variant": variant, "score": own[0].score}
        row |= {"n_attack": None, "n_scored": own[0].n_scored} | by_model(own, _summary)
        for key in ("control", "n_neurons"):
            if key in row.get("unlearned", {}):
                row[key] = row["unlearned"].pop(key)
        rows.append(row)
    return rows


def _summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    ordered = sorted(outcomes, key=lambda outcome: outcome.seed)
    attacked = [outcome for outcome in ordered if not outcome.control]
    controls = [outcome.forget_score for outcome in ordered if outcome.control]
    summary: dict[str, Any] = {
        "before": spread([outcome.before for outcome in attacked]),
        "forget_score": spread([outcome.forget_score for outcome in attacked]),
    }
    if controls:
        summary["control"] = {"forget_score": spread(controls)}
    if attacked[0].n_neurons is not None:
        summary["n_neurons"] = attacked[0].n_neurons
    return summary


def forget_score(
    model: AnswerModel,
    tokenizer: PreTrainedTokenizerBase,
    data: UnlearningDataModule,
    score: str,
    examples: Sequence[QAExample] | None = None,
) -> float:
    """A model's score on the whole forget set, or on some ``examples``, percent; each rank scores its share."""
    if examples is not None:
        # Every rank needs an example; asking all of them equally often leaves the mean as it is.
        examples = list(examples) * math.ceil(world_size() / len(examples))
    return evaluate(model, tokenizer, [data.eval_dataloader("forget", examples)], [score])["forget"][score]
