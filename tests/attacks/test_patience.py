"""A run of a sweep that no longer rises ends, and goes on after a kill with what it would have been."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from toys.sweeps import counted, harmful, interrupted, run

from lightning_ssiuu.attacks import finetune, sweep
from lightning_ssiuu.objectives.fine_tuning import FineTuning


def test_a_run_ends_when_it_has_not_risen_for_so_many_scores(models: Path, tmp_path: Path) -> None:
    scores = [20.0, 30.0, 25.0, 30.0, 99.0, 99.0]
    options: dict[str, Any] = {"learning_rates": [1e-2], "epochs": 12, "every_n_epochs": 2}

    def scored(patience: int | None) -> dict[str, Any]:
        found = iter([10.0, *scores])
        method = harmful(**options, seeds=[0], patience=patience)
        with ExitStack() as patches:
            for module in (sweep, finetune):
                patches.enter_context(patch.object(module, "attack_scores", lambda *_: {"forget": next(found)}))
            steps = patches.enter_context(counted(FineTuning, "training_step"))
            content = run(models, tmp_path / str(patience), attack=method, oracle=None)
        (curve,) = content["curves"]
        assert content["settings"]["harmful"].get("patience") == patience
        return curve | {"steps": len(steps), "highest": content["attacks"][0]["unlearned"]["forget_score"]["mean"]}

    stopped, patient, whole = (scored(patience) for patience in (2, 3, None))
    assert stopped["epochs"] == [0, 2, 4, 6, 8]
    assert stopped["forget_scores"] == [10.0, *scores[:4]]
    assert stopped["highest"] == 30.0
    assert patient["epochs"] == whole["epochs"] == [0, 2, 4, 6, 8, 10, 12]
    assert patient["forget_scores"] == whole["forget_scores"] == [10.0, *scores]
    assert [curve["steps"] for curve in (stopped, patient, whole)] == [8, 12, 12]


def test_runs_out_of_patience_are_not_repeated(models: Path, tmp_path: Path) -> None:
    method = harmful(patience=1, epochs=4)
    with patch.object(finetune, "attack_scores", lambda *_: {"forget": 0.0}):  # never above the score before
        interrupted(models, tmp_path, 5, attack=method)
        with counted(sweep, "relearn") as rest:
            content = run(models, tmp_path, attack=method)
    assert len(rest) == 8 - 5
    assert all(curve["epochs"] == [0, 1] for curve in content["curves"])


@patch.object(sweep, "_MOST_WIDENINGS", 1)
def test_a_last_score_off_the_beat_does_not_stand_for_more_epochs(models: Path, tmp_path: Path) -> None:
    """Scored is after epochs 2 and 3, of the longer run after 2, 4 and 6."""
    method = harmful(patience=1, epochs=3, every_n_epochs=2, until_saturated=True)
    rising = {0: {0: 5.0, 2: 20.0, 3: 30.0, 4: 40.0, 6: 60.0}, 1: {0: 5.0, 2: 9.0, 3: 9.0, 4: 20.0, 6: 21.0}}

    def score(model: Any, tokenizer: Any, data: Any, name: str, step: int = 0, utility: bool = False) -> Any:
        return {"forget": rising[data.seed][step]}  # an epoch is a step

    with patch.object(sweep, "attack_scores", score), patch.object(finetune, "attack_scores", score):
        expected = run(models, tmp_path / "whole", attack=method, oracle=None)
        interrupted(models, tmp_path / "part", 5, attack=method, oracle=None)  # four, and the first longer one
        assert run(models, tmp_path / "part", attack=method, oracle=None) == expected
    longer = [curve["epochs"] for curve in expected["curves"] if curve["learning_rate"] == 1e-2]
    assert longer == [[0, 2, 4, 6]] * 2
