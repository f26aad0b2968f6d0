"""Which settings are tried, and which is taken: rules on numbers, nothing runs."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_ssiuu.cli.trials import Setting, Trial, best, candidates, following


def trial(
    rate: float = 1.0, strength: float = 1.0, retain: float = 90.0, back: float | None = 10.0, **more: Any
) -> Trial:
    given: dict[str, Any] = {"reached": back is not None, "retain_before": 90.0, "retain": retain, "recovered": back}
    return Trial(Setting(rate, strength), 1e-4 * rate, **given | more)


def test_least_comes_back_of_those_that_kept_enough() -> None:
    kept, cheap, broken = trial(1, back=20.0), trial(2, back=10.0), trial(4, back=5.0, retain=60.0)
    assert best([kept, cheap, broken], 95) == cheap
    assert best([kept, cheap, broken], 60) == broken
    assert best([broken, trial(8, retain=70.0)], 95) == trial(
        8, retain=70.0
    )  # none kept enough: the one that kept most
    assert best([trial(1, back=None)], 95) is None


def test_of_those_alike_the_lowest_rate() -> None:
    assert best([trial(2, back=10.0), trial(1, back=11.9), trial(0.5, back=12.1)], 95) == trial(1, back=11.9)


def test_what_is_no_candidate_never_is_again() -> None:
    done: list[Trial] = []
    lost: set[Setting] = set()
    for rate, back in ((2, 10.0), (1, 11.5), (4, 9.0), (8, 8.9), (0.5, 30.0)):
        done.append(trial(rate, back=back))
        good = {one.setting for one in candidates(done, 95)}
        assert not good & lost
        lost |= {one.setting for one in done} - good
    assert best(done, 95) == trial(2, back=10.0)


def test_larger_rates_first_while_enough_is_kept() -> None:
    assert following([], 3, 95) == Setting(1)
    assert following([trial(1)], 5, 95) == Setting(2)
    assert following([trial(1), trial(2, back=20.0)], 5, 95) == Setting(0.5)
    assert following([trial(1), trial(2, back=9.0)], 5, 95) == Setting(4)  # the least is followed, however close
    assert following([trial(1, retain=60.0)], 5, 95) == Setting(0.5)
    assert following([trial(1), trial(2, back=5.0)], 5, 95) == Setting(4)


def test_the_last_one_is_stronger() -> None:
    assert following([trial(1), trial(2, back=5.0)], 3, 95) == Setting(2, 2)
    assert following([trial(1), trial(2, back=5.0)], 3, 95, has_strength=False) == Setting(4)
    assert following([trial(1), trial(2, retain=50.0)], 3, 95) == Setting(1, 2)
    assert following([trial(1, retain=60.0), trial(2, retain=50.0)], 3, 95) == Setting(0.5)  # too strong already
    assert following([trial(1)], 1, 95) is None
    assert following([trial(1)], 2, 95) == Setting(2)  # of two trials none is for it


@pytest.mark.parametrize(("failed", "expected"), [(None, 2.0), ("it diverged", 0.5)])
def test_where_nothing_reached_the_threshold(failed: str | None, expected: float) -> None:
    assert following([trial(1, back=None, failed=failed)], 4, 95) == Setting(expected)


def test_the_search_ends() -> None:
    done: list[Trial] = []
    while (setting := following(done, 100, 95)) is not None:
        done.append(trial(setting.rate, setting.strength, back=abs(setting.rate - 4) + setting.strength * 5))
    assert len(done) < 20
    assert len({one.setting for one in done}) == len(done)
    assert best(done, 95) is not None
    done = []
    while (setting := following(done, 100, 95)) is not None:
        done.append(trial(setting.rate, back=None))
    assert max(one.setting.rate for one in done) == 64


def test_a_trial_comes_back_from_json() -> None:
    one = trial(2, 0.5, seconds=3.0)
    assert Trial.of(one.content()) == one
