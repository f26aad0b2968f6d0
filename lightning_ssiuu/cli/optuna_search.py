"""``erase --search optuna``: Optuna's Gaussian process proposes the settings that are tried."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version

from lightning_ssiuu.cli.trials import FURTHEST, Setting, Trial
from lightning_ssiuu.utils.extras import check_extra

_TOP = int(math.log2(FURTHEST))  # doublings of the learning rate, up and down
#: Losses of settings that will not do, above all that can come back, but not by much: the rest is to be told apart.
_LOST, _NOT_REACHED, _FAILED = 100.0, 110.0, 120.0
_TENTH = 0.1


def engine(seed: int) -> str:
    """What proposes, in words for the results: Optuna's version, its sampler and the seed.

    Raises:
        UserError: If Optuna is not installed.
    """
    check_extra("optuna", "search", "optuna", "own")
    return f"optuna {version('optuna')}, GPSampler, seed {seed}"


def proposed(
    trials: Sequence[Trial], n: int, retain_at_least: float, has_strength: bool = True, seed: int = 0
) -> Setting | None:
    """What to try after these, of ``n`` in all; None: nothing more.

    The first is the recipe's own setting, and the space that of the own search: learning rates factors of two apart,
    as far from the recipe's, and the objective's strength, where it has one, the recipe's or twice that. The study is
    made anew of the finished trials each time, so the same ones and the same seed give the same proposal, also after a
    kill. A Gaussian process, because there are few trials: Optuna's default sampler wants tens of them.

    Example:
        >>> proposed([], 3, 95)
        Setting(rate=1.0, strength=1.0)
    """
    if len(trials) >= n:
        return None
    if not trials:
        return Setting()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, optuna.distributions.BaseDistribution] = {
        "doublings": optuna.distributions.IntDistribution(-_TOP, _TOP)
    }
    if has_strength:
        space["stronger"] = optuna.distributions.CategoricalDistribution([False, True])
    sampler = optuna.samplers.GPSampler(n_startup_trials=1, seed=seed + len(trials))
    study = optuna.create_study(sampler=sampler)
    for trial in trials:
        params = {"doublings": round(math.log2(trial.setting.rate)), "stronger": trial.setting.strength > 1}
        given = {name: params[name] for name in space}
        study.add_trial(
            optuna.trial.create_trial(params=given, distributions=space, value=loss(trial, retain_at_least))
        )
    asked = study.ask(space).params
    strengths = (1.0, 2.0) if has_strength else (1.0,)
    every = {Setting(2.0**doublings, strength) for doublings in range(-_TOP, _TOP + 1) for strength in strengths}
    untried = every - {trial.setting for trial in trials}

    def apart(setting: Setting) -> tuple[float, float]:
        stronger = (setting.strength > 1) != asked.get("stronger", False)
        return abs(math.log2(setting.rate) - asked["doublings"]) + stronger, setting.rate

    return min(untried, key=apart, default=None)  # it may propose a setting again, which would give the same


def loss(trial: Trial, retain_at_least: float) -> float:
    """What is minimised: what comes back, in percent; more than all where too much is lost, more where it failed.

    In the order in which :func:`~lightning_ssiuu.cli.trials.best` prefers trials.
    """
    if trial.failed is not None:
        return _FAILED
    if not trial.reached:
        return _NOT_REACHED + _TENTH * (100.0 if trial.forget is None else trial.forget)
    if trial.kept < retain_at_least:
        return _LOST + _TENTH * (retain_at_least - trial.kept)
    return 100.0 if trial.recovered is None else trial.recovered
