"""Optuna proposes settings: of a known landscape it finds the valley, the same way each time, also after a kill."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lightning_ssiuu.cli import erase as erase_command
from lightning_ssiuu.cli.erase import erase
from lightning_ssiuu.cli.optuna_search import engine, loss, proposed
from lightning_ssiuu.cli.trials import Setting, Trial, best
from lightning_ssiuu.utils.errors import UserError

pytest.importorskip("optuna")


def tried(setting: Setting) -> Trial:
    """Least comes back at eight times the rate; far above it too much is lost, and farther the run diverges."""
    away = math.log2(setting.rate) - 3
    if away > 2:
        return Trial(setting, setting.rate, failed="diverged")
    if away < -5:
        return Trial(setting, setting.rate, forget=60.0)
    back = min(95.0, 5 + 4 * away**2) - (2 if setting.strength > 1 else 0)
    kept: dict[str, Any] = {"retain_before": 90.0, "retain": 90.0 if away <= 1 else 50.0}
    return Trial(setting, setting.rate, reached=True, forget=5.0, recovered=back, **kept)


def searched(n: int, begun: list[Trial] | None = None, **options: Any) -> list[Trial]:
    done = list(begun or ())
    while (setting := proposed(done, n, 95, **options)) is not None:
        done.append(tried(setting))
    return done


def test_the_valley_is_found() -> None:
    done = searched(8, seed=0)  # of 26 settings
    assert len(done) == len({trial.setting for trial in done}) == 8
    assert done[0].setting == Setting()
    found = best(done, 95)
    assert found is not None
    assert found.setting.rate == 8
    assert {trial.setting.strength for trial in done} == {1, 2}


def test_the_same_seed_proposes_the_same_also_after_a_kill() -> None:
    done = searched(5, seed=3)
    assert searched(5, seed=3) == done
    again = [Trial.of(trial.content()) for trial in done[:3]]  # as erase.json has them
    assert searched(5, again, seed=3) == done
    assert searched(5, seed=0) != done


def test_without_a_strength_only_rates_and_none_twice() -> None:
    done = searched(40, has_strength=False)
    assert sorted(trial.setting.rate for trial in done) == [2.0**doublings for doublings in range(-6, 7)]
    assert {trial.setting.strength for trial in done} == {1.0}
    assert proposed(done, 13, 95, False) is None


def test_losses_are_in_the_order_of_what_is_taken() -> None:
    options: dict[str, Any] = {"retain_before": 90.0, "reached": True}
    good, worse = (Trial(Setting(), 1.0, retain=90.0, recovered=back, **options) for back in (10.0, 99.0))
    lost = Trial(Setting(), 1.0, retain=60.0, recovered=1.0, **options)
    missed, failed = Trial(Setting(), 1.0, forget=40.0), Trial(Setting(), 1.0, failed="diverged")
    losses = [loss(trial, 95) for trial in (good, worse, lost, missed, failed)]
    assert losses == sorted(losses)
    assert losses[:2] == [10.0, 99.0]
    assert len(set(losses)) == 5


def test_erase_asks_it_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = {"template": "plain", "probability": 90.0, "chance": 1.0, "n_forget": 4, "n_retain": 8}
    monkeypatch.setattr(erase_command.Plan, "measure", lambda self: known)
    settings: list[Setting] = []

    def attempt(self: Any, setting: Setting) -> None:
        settings.append(setting)
        self._save(trials=[*self.state["trials"], Trial(setting, setting.rate, forget=50.0).content()])
        if len(settings) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(erase_command._Erasing, "_try", attempt)
    options: dict[str, Any] = {"search": "optuna", "trials": 4, "seed": 1}
    with pytest.raises(KeyboardInterrupt):
        erase(str(tmp_path / "out"), **options)
    erased = erase(str(tmp_path / "out"), **options)
    assert [trial.setting for trial in erased.trials] == settings
    first = list(settings)
    assert len(first) == 4
    assert erased.content["search"] == engine(1)
    assert engine(1) in str(erased)
    again = erase(str(tmp_path / "again"), **options)
    assert [trial.setting for trial in again.trials] == first
    with pytest.raises(UserError, match=r"other search"):
        erase(str(tmp_path / "out"), **options | {"search": "own"})
    with pytest.raises(UserError, match=r"^search: got 'grid', allowed: one of \['own', 'optuna'\]"):
        erase(str(tmp_path / "other"), search="grid")  # type: ignore[arg-type]


def test_without_optuna_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^search: got 'optuna', allowed: own .*lightning-ssiuu\[search\]"):
        erase(str(tmp_path / "out"), search="optuna")
    assert not (tmp_path / "out").exists()
