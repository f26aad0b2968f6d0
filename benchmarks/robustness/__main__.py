"""Objectives × data × training seeds through teach, fit, attack and audit, compared at equal forgetting.

    python -m benchmarks.robustness --settings embedded --output runs/robustness
    python -m benchmarks.robustness --settings tofu --tune DIR --data DIR DIR --output runs/tofu --minutes 600

From the root of the repository. Settings of each objective are chosen on the tune data alone, as many tried for each.
What is finished is never repeated: the same command goes on after a kill, and at the end of ``--minutes`` it says what
is left (exit status 3). ``results.json`` and ``tables.md`` are written after every stage, ``plots/`` at the end
(docs/evidence/robustness.md).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.files import written_atomically
from lightning_ssiuu.utils.imports import put_off
from lightning_ssiuu.utils.locks import only_here
from lightning_ssiuu.utils.threads import wait_passively

from .collect import choose, put_attacks_beside_fit, reached, record, setting_of
from .plan import Planner, Run, read_settings
from .stages import Stage, Store
from .table import Setting

LEFT = 3


class Benchmark:
    """Settings, what is known of them, and what is to be run next."""

    def __init__(self, settings: dict[str, Any], output: Path) -> None:
        self.settings, self.output = settings, output
        self.store, self.planner = Store(output), Planner(settings)

    def choices(self) -> dict[str, Any]:
        """What was chosen for each objective, None where nothing could be; those still being tuned are left out."""
        tuning = list(self.planner.tuning())
        if not tuning:
            return {each.name: {"name": self.planner.tried[each.name][0].name} for each in self.planner.objectives}
        found: dict[str, Any] = {}
        for objective in self.planner.objectives:
            runs = [run for run in tuning if run.objective == objective.name]
            if not any(self.open(run) for run in runs):
                records = [each for run in runs if (each := record(run, self.store, self.settings["score"]))]
                found[objective.name] = choose(records, self.settings["retain_at_least"])
        return found

    def runs(self) -> list[Run]:
        """All that are known: those to compare only where the setting is."""
        chosen: dict[str, Setting] = {
            name: setting_of(choice["name"], self.planner.tried[name])
            for name, choice in self.choices().items()
            if choice is not None
        }
        return [*self.planner.tuning(), *self.planner.testing(chosen)]

    def open(self, run: Run) -> list[Stage]:
        """Stages of a run that can still be run, in order; a product that was deleted is made again if it is needed.

        A run that did not reach the forget score is not attacked.
        """
        if self.store.is_finished(run.stages["fit"]) and not reached(run, self.store):
            return []
        waiting = [
            stage for stage in run.all_stages if not self.store.is_finished(stage) and not self.store.failure(stage)
        ]
        gone = {
            need.key: need
            for stage in waiting
            for need in stage.needs.values()
            if self.store.is_finished(need) and not self.store.is_there(need)
        }
        return [*gone.values(), *waiting]

    def ready(self, stage: Stage) -> bool:
        """Whether all that it needs is there."""
        return all(map(self.store.is_there, stage.needs.values()))

    def write(self, runs: Sequence[Run]) -> dict[str, Any]:
        """Write the results as they are."""
        from .tables import markdown

        records = []
        for run in runs:
            if (found := record(run, self.store, self.settings["score"])) is not None:
                records.append(found | {"folder": str(self.store.folder(run.stages["fit"]))})
        stages = {stage.key: stage for run in runs for stage in run.all_stages}.values()
        failures = dict.fromkeys(failure for stage in stages if (failure := self.store.failure(stage)))
        left = {stage.key: f"{stage.kind} {stage.name}" for run in runs for stage in self.open(run)}
        results = {"settings": self.settings, "choices": self.choices(), "runs": records}
        results |= {"failed": list(failures), "left": list(left.values())}
        for name, text in (("results.json", json.dumps(results, indent=1)), ("tables.md", markdown(results))):
            with written_atomically(self.output / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return results

    def drop_models(self, runs: Sequence[Run]) -> None:
        """Delete the models of runs that nothing is left to do with; taught models and oracles stay."""
        busy = {run.stages["fit"].key for run in runs if self.open(run)}
        for run in runs:
            if run.stages["fit"].key not in busy:
                self.store.drop_product(run.stages["fit"])

    def go(self, minutes: float | None, delete_models: bool) -> int:
        """Run what there is time for; the exit status."""
        from .running import Runner

        runner = Runner(self.store, None if minutes is None else time.monotonic() + 60 * minutes)
        while True:
            runs = self.runs()
            pairs = [(run, stage) for run in runs for stage in self.open(run)]
            pair = next(((r, s) for r, s in pairs if self.ready(s) and runner.left() > 0 and runner.fits(s)), None)
            if delete_models:
                self.drop_models(runs)
            if pair is None:
                return self._end(self.write(runs))
            run, stage = pair
            if self.store.is_finished(stage):  # all but its model, which was deleted
                self.store.forget(stage)
            if stage.kind == "audit":
                put_attacks_beside_fit(run, self.store)
            print(f"{stage.kind} {stage.name} ({len({s.key for _, s in pairs})} left)", file=sys.stderr, flush=True)
            runner.run(stage)
            self.write(self.runs())

    def _end(self, results: dict[str, Any]) -> int:
        from .plots import save_plots

        tested = [each for each in results["runs"] if each["phase"] == "test"]
        for data in dict.fromkeys(each["data"] for each in tested):
            save_plots([each for each in tested if each["data"] == data], self.output / "plots", data)
        print((self.output / "tables.md").read_text(encoding="utf-8"))
        if results["left"]:
            print(f"{len(results['left'])} stages are left: run the same command again", file=sys.stderr)
        return LEFT if results["left"] else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0: all is done, 3: something is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--settings", default="embedded", help="a file, or the name of one in benchmarks/robustness/settings"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=float, help="no stage is begun that will not end by then; 0: write the tables"
    )
    parser.add_argument("--objectives", nargs="+", help="names in objectives.yaml, or paths of recipes")
    parser.add_argument("--data", nargs="+", help="embedded:FOLD, world_facts:SPLIT, or directories of slices")
    parser.add_argument("--tune", help="the same, for choosing settings")
    parser.add_argument("--search", type=float, nargs="+", help="settings an objective: factors on its learning rate")
    parser.add_argument("--seeds", type=int, nargs="+", help="training seeds")
    parser.add_argument("--model", help="the name of a recipe in recipes/model, or a path")
    parser.add_argument("--checkpoint", help="the model itself, in place of the recipe's")
    parser.add_argument("--retain_weights", type=float, nargs="+", help="factors: a front of each objective")
    parser.add_argument(
        "--delete_models", action="store_true", help="delete models when nothing is left to do with them"
    )
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    options = parser.parse_args(arguments)
    names = ("objectives", "data", "tune", "search", "seeds", "model", "checkpoint", "retain_weights")
    settings = read_settings(options.settings, {name: getattr(options, name) for name in names})
    if not Path("recipes").is_dir():
        raise SystemExit("run it from the root of the repository: its commands name recipes/")
    options.output.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(settings, options.output)
    if options.retry:
        stages = {stage.key: stage for run in benchmark.runs() for stage in run.all_stages}.values()
        for stage in stages:
            if (found := benchmark.store.record(stage)) is not None and found["failed"]:
                benchmark.store.forget(stage)
    from .running import Interrupted

    try:
        with only_here("output", options.output):  # a second benchmark would take the first one's stages for failed
            return benchmark.go(options.minutes, options.delete_models)
    except UserError as error:
        raise SystemExit(str(error)) from None
    except (Interrupted, KeyboardInterrupt) as error:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(error, Interrupted) else signal.SIGINT)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    put_off()
    wait_passively()
    raise SystemExit(main())
