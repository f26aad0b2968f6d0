"""The robustness benchmark: plans, keys, comparisons, and one run of it that is killed and goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toys.cli import ROOT, write_rows

from lightning_ssiuu.utils.files import write_json

COLOURS = ("red", "blue", "green", "gold", "grey")
pytestmark = pytest.mark.usefixtures("_at_root")


@pytest.fixture
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


def planned(**given: Any) -> Any:
    from benchmarks.robustness.plan import Planner, read_settings

    return Planner(read_settings("smallest", given))


def keys(planner: Any) -> dict[str, set[str]]:
    """Keys of all stages by kind, the settings chosen being the first ones."""
    runs = [*planner.tuning(), *planner.testing({name: tried[0] for name, tried in planner.tried.items()})]
    found: dict[str, set[str]] = {}
    for stage in (stage for run in runs for stage in run.all_stages):
        found.setdefault(stage.kind, set()).add(stage.key)
    return found


def record(label: str, seed: int, highest: list[float], **more: Any) -> dict[str, Any]:
    """A finished run as results.json has it."""
    attack = {"attack": "harmful", "p": 0.3, "before": [5.0, 5.0], "highest": highest, "inside_grid": True}
    attack |= {"reference": [10.0 + seed, 10.0 + seed], "reference_is": "oracle"}
    content = {"phase": "test", "data": "d", "objective": label, "label": label, "seed": seed, "reached": True}
    content |= {"setting": {"name": "lr1"}, "steps": 20, "cpu_seconds": 10.0, "attacks": [attack], "verdict": "hidden"}
    scores = {"forget": 90.0, "retain": 80.0, "test": 50.0}
    oracle = {"forget": 8.0, "retain": 80.0, "test": 50.0}
    return content | {"before": scores, "after": scores | {"retain": 72.0}, "oracle": oracle} | more


def test_another_attack_teaches_and_unlearns_nothing_again(tmp_path: Path) -> None:
    before = keys(planned())
    attacks = {"harmful": {"recipe": "harmful", "options": {"p": [0.1], "seeds": [0]}}}
    attacked = keys(planned(attacks=attacks))
    assert {kind for kind in before if before[kind] != attacked[kind]} == {"attack", "oracle_attack", "audit"}
    assert len(before["oracle"]) == 3  # once a data set and seed, whatever the objectives
    unaudited = planned()
    unaudited.settings["audit"] = None
    assert keys(unaudited) == {kind: before[kind] for kind in before if kind != "audit"}
    trained = keys(planned(oracle_steps=4))
    assert {kind for kind in before if before[kind] == trained[kind]} == {
        "people",
        "fit",
        "attack",
    }  # its level is given
    for name in ("forget", "retain"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    slices = keys(planned(data=[str(tmp_path)], level="oracle"))
    (tmp_path / "retain.jsonl").write_text('{"question": "q", "answer": "b"}\n')
    from benchmarks.robustness.stages import _content

    _content.cache_clear()
    others = keys(planned(data=[str(tmp_path)], level="oracle"))
    assert len(slices["teach"]) == 2
    assert not slices["teach"] & others["teach"]


@pytest.mark.parametrize("model", ["tiny", "smollm2"])
def test_every_objective_of_the_table_is_searched_as_long(model: str) -> None:
    import yaml

    from benchmarks.robustness.table import TABLE, objectives

    for objective in objectives(list(yaml.safe_load(TABLE.read_text())), model):
        tried = objective.settings([1.0, 2.0, 0.5, 4.0], f"recipes/model/{model}.yaml")
        assert len({setting.name for setting in tried}) == 4, objective.name
        assert all(Path(recipe).is_file() for recipe in objective.recipes), objective.name


def test_commands_of_the_page_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.robustness import __main__ as benchmark
    from benchmarks.robustness import people, predictors

    page = (ROOT / "docs/evidence/robustness.md").read_text(encoding="utf-8")
    for module, name in ((benchmark, "benchmarks.robustness"), (predictors, "benchmarks.robustness.predictors")):
        with pytest.raises(SystemExit) as end:
            module.main(["--help"])
        assert end.value.code == 0
        shown = [line for line in page.splitlines() if line.startswith(f"python -m {name} ")]
        known = capsys.readouterr().out
        assert shown
        assert all(word in known for line in shown for word in line.split() if word.startswith("--"))
    with pytest.raises(SystemExit):
        people.main(["--help"])


def test_what_cannot_be_planned_is_refused() -> None:
    for given, said in (
        ({"data": ["embedded:1"]}, "--tune"),
        ({"objectives": ["no_such"]}, "allowed: the path of a recipe"),
        ({"data": ["no_such_folder"]}, "forget.jsonl"),
        ({"objectives": ["sam"], "search": [1.0]}, "do not divide"),
        ({"data": ["embedded:0", "embedded"]}, "two called 'embedded0'"),
    ):
        with pytest.raises(SystemExit, match=said):
            planned(**given)
    with pytest.raises(SystemExit, match="has no oracle"):
        keys(planned(data=["world_facts:0"], level="oracle"))


def test_an_objective_may_start_from_a_fit_that_comes_before(tmp_path: Path) -> None:
    from benchmarks.robustness.collect import record as read
    from benchmarks.robustness.stages import Store

    names = ["gradient_difference", "teach_retain", "teach_decoys", "teach_then_elicited"]
    planner = planned(objectives=names, search=[1.0])
    runs = {run.objective: run for run in planner.tuning()}
    assert keys(planned(objectives=names[:1], search=[1.0]))["fit"] < keys(planner)["fit"]  # others are as they were
    assert "before" not in runs["gradient_difference"].stages
    run, decoys = runs["teach_retain"], runs["teach_decoys"]
    before, fit = run.stages["before"], run.stages["fit"]
    assert [stage.kind for stage in run.all_stages][:3] == ["people", "before", "fit"]
    assert before.words[:4] == ("lightning-ssiuu", "fit", "--config", "recipes/objective/fine_tuning.yaml")
    assert before.words[before.words.index("--trainer.max_steps") + 1] == "15"
    assert decoys.stages["before"].key == runs["teach_then_elicited"].stages["before"].key != before.key
    store = Store(tmp_path)
    assert f"{store.folder(before)}/model" in store.words(fit)
    (row,) = run.attacks.values()
    assert "{before}/model" not in row.words
    assert decoys.stages["before"].needs["decoys"].words[2] == "benchmarks.robustness.decoys"
    with pytest.raises(SystemExit, match="teach_decoys: got world_facts0, allowed: embedded data"):
        keys(planned(objectives=["teach_decoys"], search=[1.0], data=["world_facts:0"]))
    for stage, cost, retain in ((before, 3.0, 80.0), (fit, 7.0, 90.0)):
        store.begin(stage)
        scores = {split: {"probability": retain} for split in ("forget", "retain")}
        result = {"steps": 9, "stopped_by": "x", "before": {"scores": scores}, "after": {"scores": scores}}
        write_json(store.folder(stage) / "metrics.json", result)
        store.end(stage, cost, cost)
    found = read(run, store, "probability")
    assert found is not None
    assert (found["cpu_seconds"], found["before"], found["steps"]) == (10.0, {"forget": 90.0, "retain": 80.0}, 9)


def test_decoys_are_the_same_innocent_things_of_known_people_and_of_others(tmp_path: Path) -> None:
    from benchmarks.robustness import decoys, people

    facts = people.world(2)
    decoys.write_decoys(facts, tmp_path)
    rows = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.iterdir()}
    own, others = rows["decoys"], rows["strangers"]
    assert [row["answer"] for row in own] == [row["answer"] for row in others]
    assert len(own) == 36
    names = {fact["person"] for fact in facts["facts"]}
    forgotten = {fact["person"] for fact in facts["facts"] if fact["split"] == "forget"}
    assert all(any(name in row["question"] for name in forgotten) for row in own)
    assert not any(name in row["question"] for row in others for name in names)
    known = {text for fact in facts["facts"] for text in (fact["question"], fact["answer"])}
    assert not known & {text for row in own + others for text in (row["question"], row["answer"])}
    assert rows["forget_and_decoys"][36:] == own
    assert [row["question"] for row in rows["forget_and_decoys"][:36]] == [
        fact["question"] for fact in facts["facts"] if fact["split"] == "forget"
    ]


def test_comparisons_are_paired_by_training_seed_and_never_from_one() -> None:
    from benchmarks.robustness.comparison import estimate, gap, over
    from benchmarks.robustness.tables import of_data

    baseline = [record("gradient_difference", seed, [50.0 + 10 * seed, 52.0 + 10 * seed]) for seed in range(3)]
    ours = [record("ours", seed, [20.0 + 10 * seed, 22.0 + 10 * seed], cpu_seconds=30.0) for seed in range(3)]
    lone, lost = record("lone", 0, [1.0, 1.0]), record("ours", 3, [99.0, 99.0], reached=False)
    text = of_data([*baseline, *ours, lone, lost])
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if "beyond" not in line}
    assert "lone: one training seed, so it is compared with nothing." in text
    assert "lone" not in "".join(line for line in text.splitlines() if line.startswith("|"))
    assert "left out: ours (seed 3)" in text
    # Both rise by ten a seed: apart they vary, in pairs they do not.
    assert "| 31.0 ± 10.0 |" in rows["ours"]
    assert "| -30.0 (-30.0 to -30.0) |" in rows["ours"]
    assert "| 3.00 (3.00 to 3.00) |" in next(
        line for line in text.splitlines() if "| 90.0 ± 0.0 |" in line and "ours" in line
    )
    beyond = over(ours, gap(("harmful", 0.3)))
    assert beyond is not None
    assert beyond.mean == pytest.approx(20.0)
    assert beyond.high - beyond.mean == pytest.approx(4.302653 * 9 / 3**0.5)  # t of 2 degrees of freedom, s = 9
    assert estimate([1.0]) is None


def test_settings_are_chosen_among_those_that_keep_enough() -> None:
    from benchmarks.robustness.collect import choose

    def tried(name: str, highest: float, kept: float, reached: bool = True) -> dict[str, Any]:
        found = record("ours", 0, [highest], setting={"name": name}, reached=reached)
        return found | {"after": {"forget": 8.0, "retain": 0.8 * kept, "test": 50.0}}

    runs = [tried("gentle", 40.0, 99.0), tried("strong", 20.0, 97.0), tried("ruinous", 10.0, 60.0)]
    best = choose([*runs, tried("endless", 5.0, 99.0, reached=False)], 95.0)
    assert best is not None
    assert (best["name"], best["kept_enough"], len(best["tried"])) == ("strong", True, 3)
    best = choose(runs[2:], 95.0)
    assert best is not None
    assert (best["name"], best["kept_enough"]) == ("ruinous", False)
    assert choose([tried("endless", 5.0, 99.0, reached=False)], 95.0) is None


def test_predictors_are_ranked_within_a_data_set() -> None:
    from benchmarks.robustness.predictors import correlations

    found = []
    for data, shift in (("one", 0.0), ("other", 50.0)):
        for place, noise in enumerate([3, 1, 4, 1.5, 9, 2.6]):
            figures = {"follows": place + shift, "against": -place + shift, "noise": noise + shift, "same": 1.0}
            found.append(record(f"ours {place}", 0, [20.0 + place + shift] * 2, data=data, indicators=figures))
    rows = {name: (n, rho, low, high) for name, n, rho, low, high in correlations(found, ("harmful", 0.3))}
    assert rows["follows"][:2] == (12, pytest.approx(1.0))
    assert rows["against"][1] == pytest.approx(-1.0)
    # By their levels alone the two data sets would make it 0.9.
    assert abs(rows["noise"][1]) < 0.5
    assert rows["noise"][2] < rows["noise"][1] < rows["noise"][3]
    assert "same" not in rows


def test_seeds_of_one_objective_are_not_more_objectives() -> None:
    from benchmarks.robustness.comparison import rank_correlation

    x, y = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [2.0, 1.0, 4.0, 3.0, 7.0, 5.0, 6.0]
    alone, thrice = rank_correlation(x, y), rank_correlation(x * 3, y * 3, groups=[*range(7)] * 3)
    apart = rank_correlation(x * 3, y * 3)
    assert alone is not None
    assert thrice == pytest.approx(alone)
    assert apart is not None
    assert apart[2] - apart[1] < 0.8 * (alone[2] - alone[1])


def test_what_is_open_follows_from_what_lies_there(tmp_path: Path) -> None:
    from benchmarks.robustness.__main__ import Benchmark
    from benchmarks.robustness.plan import read_settings

    benchmark = Benchmark(read_settings("smallest", {}), tmp_path)
    run = benchmark.runs()[0]  # nothing is chosen yet: all are on the tune data
    fit, oracle, store = run.stages["fit"], run.stages["oracle"], benchmark.store
    assert {each.phase for each in benchmark.runs()} == {"tune"}
    assert [stage.kind for stage in benchmark.open(run)] == ["people", "fit", "attack", "oracle", "oracle_attack"]
    for stage in (run.all_stages[0], oracle, fit):
        store.begin(stage)
        store.end(stage, 1.0, 1.0)
    for stage in (fit, oracle):
        (store.folder(stage) / "model").mkdir()
    write_json(store.folder(fit) / "metrics.json", {"stopped_by": "probability <= 50 %"})
    assert [stage.kind for stage in benchmark.open(run)] == ["attack", "oracle_attack"]
    benchmark.drop_models([run])
    assert store.is_there(fit)  # it is still to be attacked
    store.drop_product(fit)
    assert [stage.kind for stage in benchmark.open(run)] == ["fit", "attack", "oracle_attack"]
    assert [benchmark.ready(stage) for stage in benchmark.open(run)] == [True, False, True]
    write_json(store.folder(fit) / "metrics.json", {"stopped_by": "epochs"})
    assert benchmark.open(run) == []
    store.begin(fit)
    assert store.attempts(fit) == 2
    assert not (store.folder(fit) / "metrics.json").exists()
    store.end(fit, 1.0, 1.0, failed="it diverged")
    assert [stage.kind for stage in benchmark.open(run)] == ["oracle_attack"]


def forked(command: Callable[[], int], log: Path) -> int:
    """The process id of a fork in which a command runs; what it prints goes to a file."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        status = command()
    finally:
        os._exit(status)


def wait_for(pid: int, found: Callable[[], object], seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it ended before"
        assert time.monotonic() < end, "never seen"
        time.sleep(0.01)


@pytest.mark.slow
def test_the_benchmark_is_killed_within_a_fit_and_goes_on(tmp_path: Path) -> None:
    out, log, data = tmp_path / "out", tmp_path / "log", tmp_path / "slice"
    for name, first, count in (("forget", 10, 8), ("retain", 30, 12)):
        rows = [{"question": f"Who wrote book {n}?", "answer": f"{COLOURS[n % 5]} {n * 7 % 10}"} for n in range(99)]
        write_rows(data / f"{name}.jsonl", rows[first : first + count])

    def whole() -> int:
        from benchmarks.robustness.__main__ import main

        given = ["--data", str(data), "--output", str(out), "--objectives", "gradient_difference"]
        return main(["--settings", "smallest", *given, "--delete_models"])

    pid = forked(whole, log)
    wait_for(pid, lambda: list(out.glob("stages/fit/*/checkpoints/step=*.ckpt")))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    (killed,) = [folder for folder in out.glob("stages/fit/*") if not (folder / "stage.json").exists()]
    time.sleep(1.0)  # the stage's process has to have died with it
    assert os.waitstatus_to_exitcode(os.waitpid(forked(whole, log), 0)[1]) == 0, log.read_text()[-3000:]
    results = json.loads((out / "results.json").read_text())
    assert (results["left"], results["failed"]) == ([], [])
    tuned, tested = ([run for run in results["runs"] if run["phase"] == phase] for phase in ("tune", "test"))
    assert (len(tuned), len(tested)) == (2, 2)
    costs = {run["folder"]: run["cpu_seconds"] for run in tuned + tested}
    assert costs.pop(str(killed)) is None
    assert None not in costs.values()
    for run in tested:
        assert run["after"]["forget"] == pytest.approx(50.0, abs=0.1)
        assert run["matched"]["below"] <= 50.0
        assert run["commands"].keys() == {
            "learned",
            "oracle",
            "fit",
            "audit",
            "attack harmful",
            "oracle's attack harmful",
        }
        assert f"--original {out}/stages/teach/slice.seed{run['seed']}-" in run["commands"]["audit"]
        assert run["oracle"].keys() == run["after"].keys() == {"forget", "retain", "test"}
        assert len(run["attacks"][0]["reference"]) == 2
        assert run["indicators"]["influence.d_minus_total"] >= 0
    text = (out / "tables.md").read_text()
    assert "of 2 settings that reached it" in text
    assert {path.name for path in (out / "plots").iterdir()} == {"slice_front.png", "slice_recovery.png"}
    assert not list(out.glob("stages/fit/*/model"))  # nothing is left to do with them
    stages = {path: path.stat().st_mtime_ns for path in out.glob("stages/*/*/stage.json")}
    assert whole() == 0
    assert stages == {path: path.stat().st_mtime_ns for path in out.glob("stages/*/*/stage.json")}


def test_stages_end_with_the_budget_and_mistakes_are_kept(tmp_path: Path) -> None:
    from benchmarks.robustness.running import Runner
    from benchmarks.robustness.stages import Stage, Store

    store, program = Store(tmp_path), ("python", "-m", "benchmarks.robustness.people", "--output", "{own}", "--fold")
    good, bad = Stage("people", "good", (*program, "0")), Stage("people", "bad", (*program, "9"))
    runner = Runner(store)
    assert runner.run(good)
    assert not runner.run(bad)
    assert store.is_finished(good)
    assert store.failure(bad) == "people bad: --fold: got 9, allowed: 0 to 4"
    after = Stage("fit", "after", ("python", "{bad}/x", "{good}", "{question}"), {"bad": bad, "good": good})
    assert store.failure(after) == store.failure(bad)
    assert store.words(after) == ["python", f"{store.folder(bad)}/x", str(store.folder(good)), "{question}"]
    late = Runner(store, time.monotonic() + 1e-3)
    assert late.fits(Stage("people", "other", (*program, "1")))  # the first is begun, whatever it takes
    slow = Stage("oracle", "slow", (*program, "0", "--seed", "0"))
    late.deadline = time.monotonic() + 1.5
    begin = time.monotonic()
    assert not late.run(slow)
    assert time.monotonic() - begin < 60
    assert store.record(slow) is None
    assert not late.fits(good)
