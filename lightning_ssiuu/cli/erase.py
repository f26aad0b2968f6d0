"""``lightning-ssiuu erase``: from a forget set to a verdict; every choice is made, tried and written down."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from lightning_ssiuu.cli.certify import HTML, certify
from lightning_ssiuu.cli.erase_plan import Plan, trial_of, with_attack
from lightning_ssiuu.cli.functions import Result
from lightning_ssiuu.cli.optuna_search import engine, proposed
from lightning_ssiuu.cli.parsing import run_function
from lightning_ssiuu.cli.steps import CommandRefused, Steps, minutes
from lightning_ssiuu.cli.trials import Trial, best, candidates, following
from lightning_ssiuu.evaluation.chance import Level
from lightning_ssiuu.reports.certificate.content import FILE
from lightning_ssiuu.utils.errors import Given, UserError, check_at_least, check_choice
from lightning_ssiuu.utils.files import refuse_existing, write_csv, write_json, written_atomically
from lightning_ssiuu.utils.locks import only_here
from lightning_ssiuu.utils.reading import read_json

STATE = "erase.json"
OWN = "own"
Search = Literal["own", "optuna"]
#: What it writes, beside ``trials/`` and ``certificate.key``, which stays.
_OURS = (
    *(STATE, "model", "config.yaml", "metrics.json", "attack.json", "audit.json", "report.html", "trials.csv"),
    *(FILE, HTML, "log.txt"),
)
_NOT_ERASED = 3  # exit status
_START = 4.0  # seconds that a command takes before it does anything, about


@dataclass(frozen=True, repr=False)
class Erased(Result):
    """What ``erase`` made: the trials as a table, the audit's label and sentence, where model and report are.

    Where no trial reached the threshold the label is ``not unlearned``, and there is neither.
    """

    verdict: str = ""
    sentence: str = ""
    model: Path | None = None
    report: Path | None = None
    trials: tuple[Trial, ...] = ()

    @property
    def erased(self) -> bool:
        """Whether the audit calls it erased."""
        return self.verdict == "erased"


def erase(
    output: str,
    model: str = "tiny",
    forget: str | None = None,
    retain: str | None = None,
    test: str | None = None,
    data: str | None = None,
    forget_ids: str | None = None,
    forget_where: str | None = None,
    recipe: str | None = None,
    fit: Sequence[str] | str = (),
    template: str | None = None,
    threshold: float | Level | None = None,
    trials: int = 3,
    budget: float | None = None,
    search: Search = "own",
    retain_at_least: float = 95.0,
    oracle: str | None = None,
    seed: int = 0,
    accelerator: str = "auto",
    devices: int = 1,
    precision: str = "32-true",
    overwrite: bool = False,
) -> Erased:
    """Unlearn, choosing every setting by trial, attack and audit: ``model/``, ``report.html`` and ``erase.json``.

    The template under which the model knows most of the forget set is taken. Then settings are tried: each is a run of
    ``fit`` to the threshold and, where that is reached, a small relearning attack. The learning rate is moved by
    factors of two from the recipe's, and the last trial doubles the objective's strength. Of the trials that keep
    ``retain_at_least`` the one of which least comes back is taken, attacked in full, and audited. A command that was
    ended goes on where it was when it is given again. ``config.yaml`` repeats the chosen run with ``fit``.

    Args:
        output: Directory for everything.
        model: The model before unlearning: a directory, a hub id, or ``tiny``.
        forget: File of what is to be forgotten, or text: a ``.txt`` file, or a folder. Without it and ``data``: the
            embedded facts, or what ``fit`` has.
        retain: The same of what must stay.
        test: File of bystanders, scored and never trained on.
        data: One table instead of ``forget`` and ``retain``; what is not forgotten is retained.
        forget_ids: File with the ids of the table's rows to forget, one a line.
        forget_where: Or a condition on its columns, e.g. ``customer_id == 17``.
        recipe: Of the objective and its settings; by default ``erase`` for the embedded model and
            ``model/smollm2_erase`` after it for others.
        fit: YAML file (or a list of them) with options of ``fit``, read after the recipe: columns of the data, hashed
            ids, more steps.
        template: How questions are asked; None: the one under which the model knows most.
        threshold: Forget probability in percent that ends a run; ``chance``: that of other questions' answers, worded
            alike; ``test``: of a test set the model never learned; ``mismatched``: of questions and answers re-paired
            at random. None: what the ``oracle`` gives; without one ``chance``, but for the embedded facts, whose recipe
            has a number.
        trials: How many settings to try, ≥ 1.
        budget: Minutes; after the first no trial is begun that would not end in time with what comes after it. None: no
            limit.
        search: Who proposes the settings: ``own``, as above, or ``optuna``, its Gaussian process with ``seed``, over
            the same factors; needs the extra ``search``. ``erase.json`` says which it was.
        retain_at_least: Percent of the retain score that a setting has to keep to be preferred.
        oracle: A model retrained without the forget set, for attack and audit; None: their control.
        seed: Of everything.
        accelerator: Lightning's.
        devices: How many.
        precision: ``32-true``, ``bf16-mixed`` or ``bf16-true``.
        overwrite: Begin anew, and replace what is in ``output``.

    Returns:
        The verdict, and where everything is. As a command the exit status is 0 if erased, and 3 if not, also where no
        trial reached the threshold.

    Raises:
        UserError: If an argument is outside its range, the data or a model cannot be used, or every trial failed.

    Example:
        >>> erase("runs/request_17", trials=0)
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: trials: got 0, allowed: a number ≥ 1
    """
    check_at_least("trials", trials, 1)
    if budget is not None:
        check_at_least("budget", budget, 0)
    check_choice("search", search, Search)
    chooser = OWN if search == OWN else engine(seed)
    files = (fit,) if isinstance(fit, str) else tuple(fit)
    plan = Plan(
        *(output, model, forget, retain, test, data, forget_ids, forget_where, recipe, files, template, threshold),
        *(oracle, seed, accelerator, devices, precision),
    )
    plan.check()
    # Not the directory itself, in which the commands that are run will be at work.
    with only_here("output", Path(output) / "trials"):
        return _Erasing(plan, trials, budget, chooser, retain_at_least, overwrite).run()


class _Erasing:
    def __init__(
        self, plan: Plan, trials: int, budget: float | None, search: str, retain_at_least: float, overwrite: bool
    ) -> None:
        self.plan, self.folder, self.search = plan, Path(plan.output), search
        self.n, self.retain_at_least = trials, retain_at_least
        self.end = None if budget is None else time.monotonic() + 60 * budget
        state: dict[str, Any] = {}
        if (self.folder / STATE).exists() and not overwrite:
            state = read_json(self.folder / STATE, "output", allowed=f"a directory whose {STATE} this version writes")
            now = self._asked
            if other := [name for name in now | state["asked"] if state["asked"].get(name) != now.get(name)]:
                differs = ", ".join(dict.fromkeys(name.removesuffix("_sha256") for name in other))
                allowed = f"what was asked there before (other {differs}), or another directory, or --overwrite"
                raise UserError("output", plan.output, allowed)
        else:
            tried = [f"trials/{path.name}" for path in (self.folder / "trials").iterdir()]
            refuse_existing("output", self.folder, [*_OURS, *tried], overwrite)
            for path in (self.folder / name for name in (*_OURS, *tried)):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.state = state or {"asked": self._asked, "trials": [], "seconds": {}}
        self.steps = Steps(self.folder, self.state["seconds"])

    @property
    def _asked(self) -> dict[str, Any]:
        # Of the search no more than a name: another version of Optuna may go on.
        return self.plan.asked() | ({} if self.search == OWN else {"search": self.search.partition(" ")[0]})

    @property
    def done(self) -> list[Trial]:
        return [Trial.of(content) for content in self.state["trials"]]

    def run(self) -> Erased:
        if "known" not in self.state:
            self._save(known=self.plan.measure(), search=self.search)
        self._say_known()
        if not self.plan.attackable:
            print(
                "no relearning attack: it trains on some rows and scores others. Without one nothing is called erased",
                flush=True,
            )
        while (setting := self._next()) is not None:
            self._try(setting)
        taken = [trial for trial in self.done if trial.setting.name == self.state.get("chosen")]
        chosen = taken[0] if taken else best(self.done, self.retain_at_least)
        table = self._table()
        print(table)
        if chosen is None:
            return self._not_reached(table)
        self._take(chosen)
        judging = self.plan.judging(chosen)
        for kind, words in judging.items():
            if not (self.folder / f"{kind}.json").exists():
                done = [other for other in judging if (self.folder / f"{other}.json").exists()]
                print(f"{kind} of the chosen run ({minutes(self._judging_seconds(done))})", flush=True)
                try:
                    self.steps.run(kind, words)
                except CommandRefused as refusal:
                    raise UserError(kind, Given("options that follow from these"), str(refusal)) from None
        audit = read_json(self.folder / "audit.json", "output", allowed="what audit writes")
        verdict = audit["verdict"]
        self._save(verdict=verdict["label"], sentence=verdict["sentence"])
        if (self.folder / FILE).exists():
            print(verdict["sentence"])
        else:
            certify(str(self.folder), overwrite=True)  # which says it, too
        report = self.folder / "report.html"
        print(f"model: {self.folder / 'model'}\nreport: {report}\nall of it: {self.folder / STATE}")
        shown = (table.title, table.columns, table.rows, self.state, verdict["sentence"])
        return Erased(
            *shown, verdict["label"], verdict["sentence"], self.folder / "model", report, trials=tuple(self.done)
        )

    def _not_reached(self, table: Result) -> Erased:
        failed = [trial.failed for trial in self.done if trial.failed]
        if len(failed) == len(self.done):
            self._save(trials=[])  # what was wrong may be mended: a full disk, a library
            raise UserError("fit", Given("options with which every trial fails"), str(failed[0]))
        least = min(trial.forget for trial in self.done if trial.forget is not None)
        sentence = (
            f"Not unlearned: no trial reached the threshold, the least forget probability is {least:.1f} %. "
            "More trials, a higher threshold, or another recipe."
        )
        self._save(verdict="not unlearned", sentence=sentence)
        print(sentence)
        shown = (table.title, table.columns, table.rows, self.state, sentence)
        return Erased(*shown, "not unlearned", sentence, trials=tuple(self.done))

    def _next(self) -> Any:
        if "chosen" in self.state:
            return None
        given = self.done, self.n, self.retain_at_least, self.plan.strength is not None
        setting = following(*given) if self.search == OWN else proposed(*given, self.plan.seed)
        if setting is None or not self.done or self.end is None:
            return setting
        # The longest trial so far, and what comes after the last one.
        longest = max(trial.seconds for trial in self.done)
        return setting if time.monotonic() + longest + (self._judging_seconds() or 0.0) < self.end else None

    def _judging_seconds(self, done: Collection[str] = ()) -> float | None:
        # Of what comes after the last trial; None: no trial was attacked, which would tell.
        if not (search := self.steps.seconds.get("search")):
            return None
        work = max(0.0, max(search) - _START)
        return sum(_START + times * work for kind, times in self.plan.judged_per_searched.items() if kind not in done)

    def _try(self, setting: Any) -> None:
        plan, begin = self.plan, time.monotonic()
        folder = self.folder / "trials" / setting.name
        config = plan.config(setting, self.state["known"], folder)
        rate = plan.rate(config)
        number = len(self.state["trials"]) + 1
        left = self.n - number + 1
        self._say(f"trial {number} of at most {self.n}: learning rate {rate:.3g}", {"fit": left, "search": left})
        with written_atomically(self.folder / "trials" / f"{setting.name}.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        try:
            if not (folder / "metrics.json").exists():
                self.steps.run("fit", plan.fit_words(self.folder / "trials" / f"{setting.name}.yaml"))
            trial = trial_of(setting, rate, folder)
            if trial.reached and plan.attackable and not (folder / "attack.json").exists():
                self.steps.run("search", plan.searching(folder, rate))
            trial = with_attack(trial, folder)
        except CommandRefused as refusal:
            trial = Trial(setting, rate, failed=str(refusal))
        content = trial.content() | {"seconds": round(time.monotonic() - begin, 1)}
        self._save(trials=[*self.state["trials"], content])
        good = candidates(self.done, self.retain_at_least)
        for other in self.done:  # models take room
            folder = self.folder / "trials" / other.setting.name
            for name in ("checkpoints", *([] if other in good else ["model"])):
                shutil.rmtree(folder / name, ignore_errors=True)

    def _take(self, chosen: Trial) -> None:
        # Its results move up; a move that was interrupted goes on.
        self._save(chosen=chosen.setting.name)
        source = self.folder / "trials" / chosen.setting.name
        for path in sorted(source.iterdir()) if source.exists() else ():
            if path.name == "attack.json":  # the small attack; the full one is another
                continue
            if path.name == "config.yaml":
                config = yaml.safe_load(path.read_text(encoding="utf-8"))
                config["trainer"]["default_root_dir"] = str(self.folder)
                with written_atomically(self.folder / "config.yaml") as temporary:
                    temporary.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
                path.unlink()
                continue
            if (target := self.folder / path.name).is_dir():
                shutil.rmtree(target)
            os.replace(path, target)

    def _save(self, **more: Any) -> None:
        self.state |= more | {"seconds": self.steps.seconds}
        write_json(self.folder / STATE, self.state)

    def _say(self, what: str, ahead: Mapping[str, float]) -> None:
        print(f"{what} ({minutes(self.steps.left(ahead))})", flush=True)

    def _say_known(self) -> None:
        known = self.state["known"]
        oracle = f", the oracle {known['oracle']:.1f} %" if "oracle" in known else ""
        print(
            f"{known['n_forget']} items to forget, {known['n_retain']} to retain; asked with {known['template']!r} "
            f"the model gives them {known['probability']:.1f} %, {known['chance']:.1f} % by chance{oracle}",
            flush=True,
        )

    def _table(self) -> Result:
        rows = tuple(
            (
                *(trial.setting.name, trial.learning_rate, trial.steps, trial.forget, trial.retain, trial.test),
                *(trial.recovered, trial.failed),
            )
            for trial in self.done
        )
        columns = ("trial", "learning rate", "steps", "forget", "retain", "test", "comes back", "failed")
        write_csv(self.folder / "trials.csv", columns, rows)
        front(self.folder / "plots" / "trials.png", self.done, self.retain_at_least)
        chosen_by = "" if self.search == OWN else f", proposed by {self.search}"
        return Result(f"Trials, %{chosen_by}", columns, rows, self.state)


def front(path: Path, trials: Sequence[Trial], retain_at_least: float) -> None:
    """Draw what came back of each trial over what it retained."""
    shown = [(trial, trial.recovered) for trial in trials if trial.recovered is not None]
    if not shown:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for trial, recovered in shown:
        axes.plot(trial.kept, recovered, "o", color="C0")
        axes.annotate(f"{trial.learning_rate:.2g}", (trial.kept, recovered), fontsize=8)
    axes.axvline(retain_at_least, color="grey", linewidth=0.8)
    axes.set(xlabel="retain score kept, %", ylabel="comes back under the small attack, %")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def run(args: list[str]) -> None:
    """Parse and run ``erase``."""
    erased = run_function(erase, "erase", args)
    if not erased.erased:
        raise SystemExit(_NOT_ERASED)
