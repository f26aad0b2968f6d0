"""What a new run may replace, and what an interrupted one goes on from."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toys.cli import RECIPES, ROOT, SHORT, files, fit, refused

from lightning_ssiuu import PDU
from lightning_ssiuu.cli.resume import refuse_to_lose
from lightning_ssiuu.cli.settings import HARMLESS, check_settings, run_settings
from lightning_ssiuu.training.checkpoints import newest_checkpoint
from lightning_ssiuu.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("few_facts")


def test_what_a_new_run_may_replace(tmp_path: Path) -> None:
    config = SimpleNamespace(
        overwrite=False,
        saving=SimpleNamespace(folder="model", get=lambda *_: None),
        checkpoints=SimpleNamespace(folder="checkpoints"),
    )

    def told(text: str, ckpt_path: str | None = None) -> str:
        try:
            refuse_to_lose(config, tmp_path, ckpt_path, lambda: text)
        except UserError as error:
            return error.allowed
        return ""

    assert told("a: 1") == ""
    (tmp_path / "config.yaml").write_text("a: 1")
    (tmp_path / "plots").mkdir()
    assert told("a: 1") == ""  # the same run, interrupted before it had a checkpoint
    assert "without plots" in told("a: 2") or "without config.yaml" in told("a: 2")
    assert "--ckpt_path to go on" in told("a: 2")
    assert told("a: 2", "some.ckpt") == ""
    (tmp_path / "metrics.json").touch()
    for ckpt_path in (None, "some.ckpt"):
        assert told("a: 1", ckpt_path) == "a directory without metrics.json, or --overwrite"
    config.overwrite = True
    assert told("a: 2") == ""


def test_a_checkpoint_without_the_states_to_go_on_with_is_refused(tmp_path: Path) -> None:
    """Of an earlier version: it would go on as if they were new."""
    pdu, longer = RECIPES / "objective" / "pdu.yaml", (*SHORT, "--trainer.max_steps", "4")
    root = tmp_path / "run"
    assert fit(root, *SHORT, "--checkpoints.every_n_steps", "1", recipe=pdu).status == 0
    kept = newest_checkpoint(root / "checkpoints")
    assert kept is not None
    content = torch.load(kept, weights_only=True)
    assert set(content["objective"]) == set(PDU().state())
    content["dual"] = content.pop("objective")  # where an earlier version had it
    torch.save(content, tmp_path / "old.ckpt")
    old = tmp_path / "old.ckpt"
    no_states = fit(tmp_path / "other", *longer, "--ckpt_path", old, recipe=pdu)
    refused(no_states, "ckpt_path", f"got '{old}', allowed: a checkpoint with the objective's state")
    another = fit(tmp_path / "other", *longer, "--ckpt_path", kept)
    refused(another, "model.class_path", "SSIUU", "PDU', with which the run began (step=1.ckpt)")
    assert not (tmp_path / "other").exists()
    assert fit(tmp_path / "other", *longer, "--ckpt_path", kept, recipe=pdu).status == 0


# ---- the settings a run began with ------------------------------------------------------------------------------

INIT = "model.init_args"
#: Options of another run, what is refused and what is told of it.
OTHER = {
    ("--model.init_args.retain_weight", "2"): f"{INIT}.retain_weight: got 2.0, allowed: 5.0",
    ("--model", "NPO"): "model.class_path: got 'lightning_ssiuu.NPO', allowed: 'lightning_ssiuu.SSIUU'",
    ("--model.init_args.regularizer.init_args.weight", "3"): f"{INIT}.regularizer.init_args.weight: got 3.0",
    ("--model.init_args.regularizer", "L2ToStart"): f"{INIT}.regularizer.class_path: got ",
    ("--model.init_args.regularizer", "null"): f"{INIT}.regularizer: got None, allowed: lightning_ssiuu.",
    ("--model.init_args.optimizer", "torch.optim.SGD"): f"{INIT}.optimizer.class_path: got 'torch.optim.SGD'",
    ("--model.init_args.optimizer.init_args.lr", "0.5"): f"{INIT}.optimizer.init_args.lr: got 0.5",
    ("--data.init_args.batch_size", "4"): "data.init_args.batch_size: got 4",
    ("--data.init_args.template", "Ask {question}"): "data.init_args.template: got 'Ask {question}', allowed: 'plain'",
    ("--attribution.probe_examples", "4"): "attribution.probe_examples: got 4, allowed: 8",
    ("--attribution.target", "sequence"): "attribution.target: got 'sequence', allowed: 'length_normalised'",
    ("--trainer.accumulate_grad_batches", "2"): "trainer.accumulate_grad_batches: got 2, allowed: 1",
    ("--trainer.gradient_clip_val", "0.5"): "trainer.gradient_clip_val: got 0.5, allowed: None",
    ("--seed_everything", "5"): "seed_everything: got 5, allowed: 0",
}
CHECKPOINTED = (*SHORT, "--checkpoints.every_n_steps", "1", "--trainer.max_steps", "3")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run's second step."""
    root = tmp_path_factory.mktemp("begun") / "run"
    assert fit(root, *CHECKPOINTED).status == 0
    (root / "metrics.json").unlink()  # as if it had been killed while it wrote its results
    kept = newest_checkpoint(root / "checkpoints")
    assert kept is not None
    return kept


@pytest.mark.parametrize("options", OTHER, ids=" ".join)
def test_another_run_is_not_gone_on_with(options: tuple[str, ...], begun: Path) -> None:
    before = {name: (begun.parent.parent / name).stat().st_mtime_ns for name in files(begun.parent.parent)}
    result = fit(begun.parent.parent, *CHECKPOINTED, *options, "--ckpt_path", "last")
    argument = OTHER[options].split(":", 1)[0]
    refused(
        result, argument, OTHER[options], ", with which the run began (step=2.ckpt); --ckpt_path null and --overwrite"
    )
    assert {name: (begun.parent.parent / name).stat().st_mtime_ns for name in files(begun.parent.parent)} == before


def test_what_may_be_another(begun: Path, tmp_path: Path) -> None:
    changes = (
        *("--trainer.max_steps", "4", "--trainer.log_every_n_steps", "7", "--data.init_args.num_workers", "1"),
        *("--data.init_args.eval_batch_size", "32", "--saving.folder", "weights", "--report.print_table", "false"),
        *("--checkpoints.every_n_steps", "null", "--attribution.write", "true"),
    )
    root = tmp_path / "elsewhere"
    assert fit(root, *CHECKPOINTED, *changes, "--ckpt_path", begun).status == 0
    assert (root / "weights").is_dir()


def test_a_checkpoint_of_an_earlier_version(begun: Path, tmp_path: Path) -> None:
    """It lacks the settings: those beside it are compared, and where there are none a line says so."""
    content = torch.load(begun, weights_only=True)
    del content["settings"]
    folder = tmp_path / "old" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(content, folder / "step=2.ckpt")
    given = ("--ckpt_path", folder / "step=2.ckpt")
    unchecked = fit(tmp_path / "new", *CHECKPOINTED, *given)
    assert unchecked.status == 0
    assert unchecked.err.count("lightning-ssiuu: note: ") == 1
    assert "does not hold the settings its run began with" in unchecked.err
    written = folder.parent / "config.yaml"
    written.write_text((begun.parent.parent / "config.yaml").read_text())
    other = fit(tmp_path / "other", *CHECKPOINTED, *given, "--model.init_args.retain_weight", "2")
    refused(other, "model.init_args.retain_weight", "got 2.0, allowed: 5.0, with which the run began (step=2.ckpt)")
    written.write_text("- a list")
    refused(fit(tmp_path / "other", *CHECKPOINTED, *given), "ckpt_path", "config.yaml")


def test_names_that_stand_for_no_checkpoint(tmp_path: Path) -> None:
    for name, told in (("best", "known within a run alone"), ("hpc", "there is no hpc_ckpt_<n>.ckpt in")):
        refused(fit(tmp_path / "run", *SHORT, "--ckpt_path", name), "ckpt_path", f"got '{name}'", told)
    assert not (tmp_path / "run").exists()


def test_which_difference_is_one(tmp_path: Path) -> None:
    def difference(old: Any, new: Any) -> str | None:
        try:
            check_settings({"data": {"class_path": "a.B", "init_args": {"x": old}}}, _data(new), "step=1.ckpt")
        except UserError as error:
            return error.argument
        return None

    def _data(value: Any) -> dict[str, Any]:
        return {"data": {"class_path": "a.B", "init_args": {"x": value, "of a later version": 1}}}

    assert difference({"a": 1}, {"a": 1}) is None
    assert difference({"a": 1}, {"a": 1, "b": 2}) == "data.init_args.x.b"  # a mapping of the user's
    assert difference({"a": 1, "b": 2}, {"a": 1}) == "data.init_args.x.b"
    assert difference([1, 2], [2, 1]) == "data.init_args.x"
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "data.json").touch()
    one, two = (str(tmp_path / place / "data.json") for place in ("one", "two"))
    assert difference(one, two) == "data.init_args.x"  # both are there: two files
    Path(one).unlink()
    assert difference(one, two) is None  # it was moved
    assert difference(one, two.replace("data", "other")) == "data.init_args.x"


@pytest.mark.parametrize("section", ["stopping.walk_back", "stopping.elicited", "attribution.elicited"])
def test_an_option_of_a_later_version_in_a_section_of_a_section(section: str) -> None:
    outer, inner = section.split(".")
    check_settings({outer: {inner: {"a": 1}}}, {outer: {inner: {"a": 1, "later": 2}}}, "step=1.ckpt")
    with pytest.raises(UserError, match=rf"^{section}\.a: got 2"):
        check_settings({outer: {inner: {"a": 1}}}, {outer: {inner: {"a": 2, "later": 2}}}, "step=1.ckpt")


def test_what_is_harmless_is_documented() -> None:
    page = (ROOT / "docs" / "how-to" / "interrupted.md").read_text(encoding="utf-8")
    for option in HARMLESS:
        assert f"`{option.removeprefix('trainer.').split('.init_args.')[-1]}`" in page, option
    assert run_settings("trainer: {max_steps: 3, precision: null}") == {"trainer": {"precision": None}}


@pytest.mark.parametrize(
    ("schedule", "follows"),
    [
        ("lr_scheduler: cosine_with_warmup", True),
        ("lr_scheduler: constant_with_warmup, warmup_steps: 2", False),
        ("lr_scheduler: constant_with_warmup, warmup_steps: 0.1", True),
        ("lr_scheduler: {class_path: transformers.get_linear_schedule_with_warmup}", True),
        ("lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 3}}", False),
        ("lr_scheduler: null", False),
    ],
)
def test_more_steps_are_not_harmless_to_a_schedule_that_follows_them(schedule: str, follows: bool) -> None:
    began, now = (
        run_settings(f"{{model: {{class_path: NPO, init_args: {{{schedule}}}}}, trainer: {{max_steps: {steps}}}}}")
        for steps in (8, 16)
    )
    with pytest.raises(UserError, match=r"^trainer\.max_steps: got 16, allowed: 8") if follows else nullcontext():
        check_settings(began, now, "step=4.ckpt")
