"""What an attack is, what it leaves, and the rows of ``attack.json`` that attacks without training give."""

from __future__ import annotations

import gc
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.attacks.curves import RecoveryCurve, gap, spread
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.evaluation.scores import check_score
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_tokenizer
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import naming

_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


@dataclass(frozen=True)
class Target:
    """A saved model to attack.

    Args:
        argument: The argument it was given for, e.g. ``"model"`` or ``"oracle"``.
        checkpoint: What was given.
        devices: Launched before :meth:`load`.

    Example:
        >>> target = Target("model", "tiny", Devices("cpu"))
        >>> model, tokenizer = target.load()
        >>> target.name, tokenizer.padding_side
        ('unlearned', 'right')
    """

    argument: str
    checkpoint: str
    devices: Devices

    @property
    def name(self) -> str:
        """Its name in the results: ``"unlearned"`` or that of the argument."""
        return "unlearned" if self.argument == "model" else self.argument

    def load(self) -> tuple[AnswerModel, PreTrainedTokenizerBase]:
        """Load the model and its tokenizer; what is wrong with them is told under the argument's name."""
        if self.devices.sharded:
            gc.collect()  # units of FSDP refer to each other, and two models at once may not fit
        with naming(self.argument):
            return self.devices.load(self.checkpoint), load_tokenizer(self.checkpoint)


@dataclass
class Outcome:
    """One attack on one model, without any training; :meth:`Attack.outcome` makes it.

    Args:
        model: ``"unlearned"`` or ``"oracle"``.
        kind: The attack's class in snake case, e.g. ``"quantization"``.
        variant: Which form of it, e.g. ``"8bit"``; None where there is one only.
        seed: Of what is random; 0 where nothing is. For controls the number of the draw.
        n_scored: Questions scored.
        before: The model's score without the attack, percent.
        forget_score: Its score under the attack, percent.
        control: Whether this is the attack's control: random neurons instead of the flagged ones.
        n_neurons: How many neurons were changed; None where that is not what the attack does.
        score: What was measured; the score asked for, except where :mod:`~.sampling` counts answers given.
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
    score: str = ""


@dataclass
class Attack(ABC):
    """An attack on a saved model. Its options are dataclass fields; :meth:`run` is what it does.

    ``attack --attack my_attacks.Noise --attack.std 0.2`` runs one of one's own and puts it into ``attack.json`` under
    its name. An attack that fine-tunes is a :class:`~lightning_ssiuu.Relearning` attack, which is swept and resumed.

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
        >>> here = Devices("cpu")
        >>> (outcome,) = Noise(std=0.0).run([Target("model", "tiny", here)], Facts(), "first_token", here)
        >>> outcome.kind, outcome.before, outcome.forget_score
        ('noise', 100.0, 100.0)
    """

    #: Options that hold paths: they are not shown in ``attack.json``.
    paths: ClassVar[tuple[str, ...]] = ()

    @property
    def kind(self) -> str:
        """The class's name in snake case: ``"kind"`` in ``attack.json``."""
        return _WORDS.sub("_", type(self).__name__).lower()

    @property
    def name(self) -> str:
        """The name of its entries in ``attack.json``, the same for whatever replaces them."""
        return self.kind

    def options(self) -> dict[str, Any]:
        """All options, as JSON can write them."""
        return {name: _plain(value) for name, value in vars(self).items() if not name.startswith("_")}

    def settings(self) -> dict[str, Any]:
        """The options that ``attack.json`` tells: no paths."""
        return {name: value for name, value in self.options().items() if name not in self.paths}

    def check(self, data: UnlearningDataModule, score: str, devices: Devices) -> None:
        """Check everything a user may have got wrong, before processes are started and models are loaded.

        Args:
            data: The data module.
            score: A score's name.
            devices: Not launched yet.

        Raises:
            UserError: Naming the argument.
        """
        check_score(score, "score")
        data.setup("validate")
        data.check_share(devices.n_ranks)

    @abstractmethod
    def run(
        self, targets: Sequence[Target], data: UnlearningDataModule, score: str, devices: Devices
    ) -> Iterable[Outcome | RecoveryCurve]:
        """Attack; the weights on disk and the data stay as they are.

        Args:
            targets: The models, ``"unlearned"`` and perhaps ``"oracle"``, none of them loaded yet.
            data: The data module the model was unlearned with.
            score: A score's name.
            devices: Launched; each rank scores its share of the questions and gets the outcome of all.

        Returns:
            An outcome for each model, variant and seed; of relearning a curve for each attack.
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
        """What the attack found on one model.

        Args:
            target: The model.
            data: Whose whole forget set was scored, unless ``n_scored`` is given.
            score: What was measured.
            before: Percent, without the attack.
            after: Percent, under the attack.
            variant: Which form of the attack; None where there is one only.
            **more: ``seed``, ``control``, ``n_neurons`` or ``n_scored``, see :class:`Outcome`.
        """
        figures = {"seed": 0, "n_scored": len(data.splits.forget), "before": before, "forget_score": after}
        return Outcome(target.name, self.kind, variant, **(figures | {"score": score} | more))

    def rows(self, results: Sequence[Any], score: str) -> list[dict[str, Any]]:
        """The rows of ``attack.json`` that sum up what :meth:`run` gave.

        Args:
            results: Of all models, variants and seeds.
            score: The score asked for.
        """
        return [row | {"attack": self.name} for row in outcome_rows(results)]


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)


def outcome_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row for each variant: both models, the gap to the oracle seed by seed, and the control.

    Args:
        outcomes: All seeds of both models.

    Returns:
        Rows of ``attack.json``. ``control`` and ``n_neurons`` beside the models are the unlearned model's; the oracle's
        are inside ``oracle``.

    Example:
        >>> outcomes = [Outcome(model, "quantization", "4bit", 0, 36, 5.0, score)
        ...             for model, score in (("unlearned", 30.0), ("oracle", 12.0))]
        >>> (row,) = outcome_rows(outcomes)
        >>> row["attack"], row["variant"], row["unlearned"]["forget_score"]["mean"], row["gap"]["mean"]
        ('quantization', '4bit', 30.0, 18.0)
    """
    rows = []
    for kind, variant in dict.fromkeys((outcome.kind, outcome.variant) for outcome in outcomes):
        own = [outcome for outcome in outcomes if (outcome.kind, outcome.variant) == (kind, variant)]
        row: dict[str, Any] = {"attack": kind, "kind": kind, "p": None, "variant": variant, "score": own[0].score}
        row |= {"n_attack": None, "n_scored": own[0].n_scored}
        for name in dict.fromkeys(outcome.model for outcome in own):
            row[name] = _summary([outcome for outcome in own if outcome.model == name])
        row |= gap(row)
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
    model: AnswerModel, tokenizer: PreTrainedTokenizerBase, data: UnlearningDataModule, score: str
) -> float:
    """A model's score on the whole forget set, percent; each rank scores its share.

    Example:
        >>> from lightning_ssiuu import Facts
        >>> from lightning_ssiuu.models.loading import load_model, load_tokenizer
        >>> forget_score(AnswerModel(load_model("tiny")), load_tokenizer("tiny"), Facts(), "first_token")
        100.0
    """
    return evaluate(model, tokenizer, [data.eval_dataloader("forget")], [score])["forget"][score]
