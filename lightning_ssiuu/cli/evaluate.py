"""``lightning-ssiuu evaluate``: a benchmark by its own protocol, figures under the names of its literature."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from lightning_ssiuu.cli.parsing import run_function
from lightning_ssiuu.cli.report import Report, print_table
from lightning_ssiuu.datamodules import QAExample, Splits, UnlearningDataModule
from lightning_ssiuu.datamodules.trained_on import refuse_trained
from lightning_ssiuu.evaluation.runs import run_data, run_of
from lightning_ssiuu.evaluation.signals import find_signal
from lightning_ssiuu.evaluation.suites import SUITES, Suite
from lightning_ssiuu.evaluation.suites.logs import FIGURES, beside, check_examples, check_log
from lightning_ssiuu.evaluation.suites.measure import check_readings, measure_suite, suite_sets
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError, naming
from lightning_ssiuu.utils.files import print_written
from lightning_ssiuu.utils.reading import read_json
from lightning_ssiuu.utils.registry import nearest


def evaluate(
    model: str,
    suite: str,
    reference: str | None = None,
    data: UnlearningDataModule | None = None,
    path: str | None = None,
    figures: Sequence[str] | None = None,
    classifier: str | None = None,
    output: str | None = None,
    devices: Devices | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measure a benchmark by its own protocol and write ``evaluate.json`` and the suite's log.

    The log (``TOFU_EVAL.json``) is in open-unlearning's format, by figure and example, without any text. A suite fixes
    which sets are scored how; templates are the model's or the data module's.

    Args:
        model: The model: a directory written by ``fit``, or any checkpoint.
        suite: ``tofu``, ``muse``, ``wmdp``, ``wmdp_deduped``, ``rwku``, ``knowundo``, ``lume`` or
            ``faithun``.
        reference: A model that was not trained on the forget set, or the log of one (a ``.json`` file, ours or
            open-unlearning's): for figures such as forget quality. Without one these are left out.
        data: The data module, of the suite's class, with its options; by default the run's if it is one, else one that
            asks as the run's does.
        path: Directory of the published files, or a hub id, for the data module made by default.
        figures: The figures to measure, with those they are made of; by default all that can be had.
        classifier: Directory or hub id of the classifier for figures such as ``forget_Q_A_gibberish``, which are left
            out without one unless they are named.
        output: Directory for the results; by default the model's run.
        devices: Where to run. The figures do not depend on it, but for rounding.
        overwrite: Replace an earlier ``evaluate.json`` and log.

    Returns:
        The contents of ``evaluate.json``, on every process; figures in the benchmark's units.

    Raises:
        UserError: If an argument is outside its range, or what the suite needs is not there; nothing is written then.
    """
    devices = devices if devices is not None else Devices()
    chosen, names = _chosen(suite, classifier, figures, reference, devices)
    log = _read_log(reference, chosen, names)
    models = {"model": model, "reference": reference if log is None else None}
    files = [FIGURES, chosen.log_name]
    with Report(models, suite_data(chosen, model, data, path), devices, output, files, overwrite) as report:
        of_reference = chosen.of_reference(names) if reference is not None else []
        of_reference = chosen.wanted(of_reference) if of_reference else []
        sets, digests = _checked_sets(report, chosen, [*names, *of_reference])
        if reference is not None and of_reference:
            if log is not None:
                check_examples(log, chosen, chosen.of_reference(names), sets)
            _check_another(reference, report.weights_sha256, digests)
        report.__dict__["data_sha256"] = _sha256(report.data, sets)
        devices.tokens_of_a_pass = partial(_tokens_of_a_pass, report.data, sets)
        with devices.launched():
            if log is None and of_reference:
                log = _measured("reference", report, sets, chosen, of_reference)
            measured = _measured("model", report, sets, chosen, names, log)
            content = {
                "suite": suite,
                "figures": {name: measured[name]["agg_value"] for name in names},
                "reference": None if not of_reference else "model" if "reference" in report.models else "log",
                "n_items": {name: len(examples) for name, examples in sets.items()},
                "sets_sha256": digests,
                "log": chosen.log_name,
                "provenance": report.provenance([suite, names, devices.precision, reference is not None]),
            }
            if devices.is_first:
                try:
                    report.write(chosen.log_name, dict(sorted(measured.items())))
                    report.write(FIGURES, content)
                finally:  # also where the disk refuses
                    print_evaluation(content, chosen)
                print_written(report.folder, files)
        return content


def _chosen(
    suite: str, classifier: str | None, figures: Sequence[str] | None, reference: str | None, devices: Devices
) -> tuple[Suite, list[str]]:
    # The suite and the figures that are measured of it; refused is what they cannot be measured with.
    if suite not in SUITES:
        meant = nearest(suite, SUITES)
        raise UserError("suite", suite, f"one of {list(SUITES)}" + (f" ({meant})" if meant else ""))
    if devices.precision == "bf16-mixed":
        raise UserError("precision", devices.precision, "'32-true', 'bf16-true': nothing is trained")
    chosen = SUITES[suite] if classifier is None else SUITES[suite].classifying(classifier)
    names = chosen.wanted(figures, reference is not None)
    compared = [name for name in names if chosen.figures[name].needs_reference]
    if compared and reference is None:
        raise UserError("reference", None, f"a model or its log, which {', '.join(compared)} compare with")
    signals = (find_signal(reading.score) for reading in chosen.readings(names))
    if devices.sharded and any(signal is not None and signal.gradient for signal in signals):
        raise UserError("strategy", "fsdp2", "auto, ddp, or figures without whole gradients: --figures")
    return chosen, names


def _checked_sets(
    report: Report, suite: Suite, names: Sequence[str]
) -> tuple[dict[str, Sequence[QAExample]], dict[str, str]]:
    # The sets that figures are read off, and their digests.
    readings = suite.readings(names)
    sets = suite_sets(report.data, readings)
    _check_untrained(sets, suite, report.models["model"], report.models.get("reference"))
    for name, examples in sets.items():
        if len(examples) < report.devices.n_ranks:
            allowed = f"at most {len(examples)}, the number of examples of the set {name}"
            raise UserError("devices", report.devices.n_ranks, allowed)
    check_readings(report.data, sets, readings)
    return sets, {name: Splits(examples, []).sha256() for name, examples in sets.items()}


def _measured(
    argument: str, report: Report, sets: Mapping[str, Sequence[QAExample]], suite: Suite, names: list[str], *log: Any
) -> dict[str, dict[str, Any]]:
    with naming(argument):
        model = report.devices.load(report.models[argument])
    return measure_suite(model, report.data, sets, suite, names, *log)


def suite_data(
    suite: Suite, model: str, data: UnlearningDataModule | None, path: str | None = None
) -> UnlearningDataModule:
    """The data module to measure a suite with: the one given, else the run's, else one that asks as the run's does.

    Raises:
        UserError: One of another class than the suite's, or a path where it is not wanted.
    """
    if data is not None:
        if not isinstance(data, suite.data):
            raise UserError("data", type(data).__name__, f"{suite.data.__name__}, for the suite {suite.name}")
        if path is not None:
            raise UserError("path", path, "null beside data, which has one of its own")
        return data
    own = run_data(model, None) if run_of(model) is not None else None
    if isinstance(own, suite.data) and path is None:
        return own
    options: dict[str, Any] = {} if path is None else {"path": path}
    options |= {"split": own.split} if isinstance(own, suite.data) and hasattr(own, "split") else {}
    try:
        return suite.data(tokenizer=model, **options, **({} if own is None or suite.renders else own.encoding))
    except TypeError as error:
        allowed = "a directory of the published files, or null with" if path is None else "null: give"
        raise UserError("path", path, f"{allowed} --data {suite.data.__name__} and its options") from error


def print_evaluation(content: Mapping[str, Any], suite: Suite) -> None:
    """Print the figures of ``evaluate.json`` that the suite shows."""
    figures = content["figures"]
    rows = [(name, _shown(figures[name])) for name in suite.shown or figures if name in figures]
    sizes = ", ".join(f"{name} {size}" for name, size in content["n_items"].items())
    print_table([("figure", "value"), *rows], f"Suite {suite.name}: {sizes} items")


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _read_log(reference: str | None, suite: Suite, names: Sequence[str]) -> dict[str, Any] | None:
    # None where the reference is a model, or there is none.
    if reference is None or Path(reference).suffix != ".json":
        return None
    needed = suite.of_reference(names)
    content: dict[str, Any] = read_json(Path(reference), "reference", allowed="a log, as evaluate writes it")
    check_log(content, needed, reference)
    return content


def _check_untrained(sets: Mapping[str, Sequence[QAExample]], suite: Suite, model: str, reference: str | None) -> None:
    allowed = f"items that are only scored: with these it is not {suite.name}. Unlearn the benchmark's training set"
    trained = _trained_by(model)
    for name in suite.only_scored:
        refuse_trained(sets.get(name, ()), chain(*trained), name, allowed)
    trained = [] if reference is None else _trained_by(reference)
    for name in suite.forgotten:
        refuse_trained(sets.get(name, ()), chain(*trained), "reference", f"a model that never saw the set {name}")


def _trained_by(model: str) -> list[Sequence[QAExample]]:
    # What the run of a model was unlearned or trained on; nothing where fit did not write it.
    if run_of(model) is None:
        return []
    data = run_data(model, None)
    return [data.splits.retain] if data.train_on == "retain" else [data.splits.forget, data.splits.retain]


def _check_another(reference: str, weights: Mapping[str, str], digests: Mapping[str, str]) -> None:
    # A model is compared with another one on the same examples.
    told = {} if "reference" in weights else beside(reference)
    theirs = weights.get("reference", ((told.get("provenance") or {}).get("weights_sha256") or {}).get("model"))
    if theirs == weights["model"]:
        raise UserError("reference", reference, "another model: these are the very weights that are measured")
    for name, digest in (told.get("sets_sha256") or {}).items():
        if name in digests and digest != digests[name]:
            raise UserError("reference", reference, f"a log of the same examples: its set {name} is another")


def _sha256(data: UnlearningDataModule, sets: Mapping[str, Sequence[QAExample]]) -> str:
    digest = hashlib.sha256()
    for name, examples in sets.items():
        digest.update(f"{name} {data.encoder.sha256(Splits(examples, []), {})}".encode())
    return digest.hexdigest()


def _tokens_of_a_pass(data: UnlearningDataModule, sets: Mapping[str, Sequence[QAExample]]) -> int:
    first = next(iter(sets.values()))[: data.eval_batch_size]
    return sum(len(data.encoder.of(example)[0]) for example in first)


def run(args: list[str]) -> None:
    """Parse and run ``evaluate``."""
    run_function(evaluate, "evaluate", args)
