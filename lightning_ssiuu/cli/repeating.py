"""Figures of a certificate, measured again: the scores, or an attack with the options that stand in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import lightning_ssiuu.attacks
from lightning_ssiuu.attacks import Attack, Relearning
from lightning_ssiuu.cli.functions import attack
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.evaluation.results import ATTACKS
from lightning_ssiuu.evaluation.runs import asking, made_of, run_data
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import Given, UserError
from lightning_ssiuu.utils.messages import parsing

SCORES = "scores"
_TOLERANCE = 0.1  # percentage points; a certificate has one decimal


@dataclass(frozen=True)
class Figure:
    """A figure in percent, ``now`` and ``then``, and how far the two may differ.

    Example:
        >>> print(Figure("forget probability", 9.93, 9.9))
        forget probability: 9.9 % now, 9.9 % in the certificate: agrees within 0.1
    """

    name: str
    now: float
    then: float
    within: float = _TOLERANCE

    @property
    def agrees(self) -> bool:
        """Whether they differ by no more."""
        return abs(self.now - self.then) <= self.within + 1e-9  # not where it is no number

    def __str__(self) -> str:
        said = "agrees" if self.agrees else "does not agree"
        return (
            f"{self.name}: {self.now:.1f} % now, {self.then:.1f} % in the certificate: {said} within {self.within:.1f}"
        )


def scored_again(
    content: Mapping[str, Any], model: str, data: UnlearningDataModule | None, devices: Devices
) -> Iterator[Figure]:
    """The forget score of a certificate."""
    data = asking(run_data(model, data), content.get("scored", {}).get("data_options", {}))
    data.setup("validate")
    wanted = content["scores"]["unlearned"]["forget"]
    score = "probability" if "probability" in wanted else next(iter(wanted))
    with devices.launched():
        found = evaluate(devices.load(model), data.tokenizer, [data.eval_dataloader("forget")], [score])
    yield Figure(f"forget {score.replace('_', ' ')}", found["forget"][score], wanted[score])


class AttackAgain:
    """An attack of a certificate, or a part of it.

    Args:
        content: The certificate's.
        name: The attack's.
        p: The fraction to repeat; None: all.
        seed: The seed to repeat, of the run that found most in it; None: all of the attack.

    Raises:
        UserError: The certificate has no such attack, p or seed, or not all options of the attack.
    """

    def __init__(self, content: Mapping[str, Any], name: str, p: float | None, seed: int | None) -> None:
        rows = [row for row in content["tried"] if row["attack"] == name]
        known = [each for each in content["settings"] if (kind := _class(each)) is not None and not kind.paths]
        if name not in known or not rows:
            raise UserError("repeat", name, f"one of {[SCORES, *known]}: what the certificate has all options of")
        if p is not None and p not in (tried := [row["p"] for row in rows if row["p"] is not None]):
            raise UserError("p", p, f"one of {tried}" if tried else f"null with {name}, which has no such option")
        self.rows = [row for row in rows if p in (None, row["p"])]
        self.name, self.seed, self.settings = name, seed, content["settings"][name]
        self.attack = _made(self.settings, name)
        if p is not None:
            self.attack = replace(self.attack, p=[p])  # type: ignore[call-arg]
        seeds = [one["seed"] for one in rows[0]["unlearned"].get("by_seed", [])]
        if seed is not None and seed not in seeds:
            raise UserError("seed", seed, f"one of {seeds}" if seeds else f"null with {name}, which trains nothing")

    def on(self, model: str, data: UnlearningDataModule | None, devices: Devices) -> Iterator[Figure]:
        """The highest scores of a model under it, by p and variant.

        Raises:
            UserError: Another precision than that of the attack.
        """
        if devices.precision != self.settings.get("precision", devices.precision):
            raise UserError("precision", devices.precision, f"{self.settings['precision']!r}, that of the attack")
        if self.seed is None:
            whole = self._found(self.attack, model, data, devices)
        for row in self.rows:
            recorded = row["unlearned"]["highest"]
            then, name = recorded["mean"], f"{self._called(row)}, highest"
            if self.seed is None:
                found = next(one for one in whole if (one["p"], one["variant"]) == (row["p"], row["variant"]))
            else:
                runs = row["unlearned"]["by_seed"]
                place = next(n for n, run in enumerate(runs) if run["seed"] == self.seed)
                then, name = recorded["per_seed"][place], f"{name} of seed {self.seed}"
                (found,) = self._found(_alone(self.attack, row["p"], runs[place]), model, data, devices)
            now = found["unlearned"]["forget_score"]["mean"]
            yield Figure(name, now, then, max(recorded["std"], _TOLERANCE))

    def _found(self, attacking: Attack, model: str, data: UnlearningDataModule | None, devices: Devices) -> Any:
        score = self.settings["score"]
        data = asking(run_data(model, data), self.settings.get("data_options", {}))
        return attack(model, attack=attacking, data=data, score=score, control="none", devices=devices).content

    def _called(self, row: Mapping[str, Any]) -> str:
        words = [self.name.replace("_", " "), row["variant"] or "", "" if row["p"] is None else f"{100 * row['p']:g} %"]
        return " ".join(filter(None, words))


def _class(name: str) -> type[Attack] | None:
    kind = name.removesuffix("_lora")
    called = "".join(word.capitalize() for word in kind.split("_"))
    return getattr(lightning_ssiuu.attacks, called) if kind in ATTACKS else None


def _made(settings: Mapping[str, Any], name: str) -> Attack:
    kind = _class(name)
    assert kind is not None
    options = {field.name: settings[field.name] for field in fields(kind) if field.name in settings}
    with parsing():
        made: Attack = made_of("attack", Attack, {"class_path": kind.__name__, "init_args": options})
    return made


def _alone(attack: Attack, p: float | None, run: Mapping[str, Any]) -> Attack:
    # The one run that found the highest score of a seed.
    assert isinstance(attack, Relearning)
    attacker = next((one for one in attack.attackers if one.settings == run.get("attacker", {})), None)
    if attacker is None:
        raise UserError(
            "certificate", Given("an attacker that is none of its attack's"), "a certificate as it was made"
        )
    alone = replace(attack, seeds=[run["seed"]], learning_rates=[run["learning_rate"]], epochs=run["epochs"])
    alone = replace(alone, attackers=[replace(attacker, learning_rates=None)], until_saturated=False, patience=None)
    return alone if p is None else replace(alone, p=[p])  # type: ignore[call-arg]
