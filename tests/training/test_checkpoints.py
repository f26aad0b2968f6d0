"""Checkpoints and results are whole or absent: killed while writing, on a full disk, damaged afterwards."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from toys.cli import SHORT, fit
from toys.data import Toy
from toys.models import bare_trainer, equal, weights
from toys.training import Tiny

from lightning_ssiuu import AtomicCheckpointIO
from lightning_ssiuu.callbacks import ForgetThresholdStopping, KeepCheckpoints, NeuronAttributionCallback
from lightning_ssiuu.training.checkpoints import check_checkpoint, newest_checkpoint, write_whole_checkpoints
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.files import clear_leftovers, disk_refusal, written_atomically
from lightning_ssiuu.utils.messages import user_error

pytestmark = pytest.mark.usefixtures("few_facts")

PLAIN = {"loops": {}, "global_step": 3, "state_dict": {"a": torch.zeros(1 << 16)}}


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Inside, no file can grow beyond ``room`` bytes: the system refuses as it does where there is no room at all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Fills(Callback):
    """Fills the disk at a step, or when training has ended."""

    def __init__(self, step: int | None = None) -> None:
        self.step, self.full = step, contextlib.ExitStack()

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.full.enter_context(full_disk(100_000))

    def on_train_end(self, *_: Any) -> None:
        if self.step is None:
            self.full.enter_context(full_disk(100_000))

    def teardown(self, *_: Any) -> None:
        self.full.close()

    def on_exception(self, *_: Any) -> None:
        self.full.close()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def killed(work: Callable[[], Any]) -> None:
    """Run in a forked process that must end by SIGKILL."""
    if (child := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---- one file, one folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 100, 200_000])  # nothing; within the weights; the end of the file
def test_full_disk_leaves_the_last_checkpoint(room: int, tmp_path: Path) -> None:
    path, writer = tmp_path / "a.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint(PLAIN, path)
    before = path.read_bytes()
    with full_disk(room), pytest.raises(UserError) as caught:
        writer.save_checkpoint(PLAIN | {"global_step": 4}, path)
    assert (
        str(caught.value)
        == f"output directory: got {str(tmp_path)!r}, allowed: one that can be written (File too large)"
    )
    assert path.read_bytes() == before
    assert names(tmp_path) == {"a.ckpt"}


def test_a_place_that_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.ckpt", tmp_path / "file" / "deeper" / "a.ckpt"):
        with pytest.raises(UserError, match=r"output directory: got .*file.*, allowed: one that can be written"):
            AtomicCheckpointIO().save_checkpoint(PLAIN, path)
    assert names(tmp_path) == {"file"}


def test_what_a_killed_process_left_is_removed_but_nobody_elses(tmp_path: Path) -> None:
    began, begins = os.pipe()
    if (child := os.fork()) == 0:
        with written_atomically(tmp_path / "theirs") as temporary:
            temporary.write_text("half")
            os.write(begins, b"x")
            time.sleep(60)
    try:
        os.read(began, 1)
        leftovers = names(tmp_path)
        assert len(leftovers) == 1
        with written_atomically(tmp_path / "ours") as temporary:
            temporary.write_text("whole")
        assert names(tmp_path) == leftovers | {"ours"}
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with written_atomically(tmp_path / "ours") as temporary:
        temporary.write_text("whole again")
    assert names(tmp_path) == {"ours"}
    os.close(began)
    os.close(begins)


def test_a_folder_whose_replacement_was_interrupted_is_the_new_one(tmp_path: Path) -> None:
    def write(text: str) -> None:
        with written_atomically(tmp_path / "model") as temporary:
            temporary.mkdir()
            (temporary / "weights").write_text(text)

    write("old")

    def interrupted() -> None:
        rename = Path.rename

        def once(self: Path, target: Path) -> None:
            Path.rename = die  # type: ignore[method-assign, assignment]
            rename(self, target)

        Path.rename = once  # type: ignore[method-assign, assignment]
        write("new")

    killed(interrupted)
    assert "model" not in names(tmp_path)
    clear_leftovers(tmp_path)
    assert names(tmp_path) == {"model"}
    assert (tmp_path / "model" / "weights").read_text() == "new"


def test_disk_errors_as_libraries_report_them() -> None:
    class CheckpointException(BaseException):  # torch's, from another rank
        def __init__(self) -> None:
            self.failures = {1: (OSError(errno.ENOSPC, "No space"), "where")}

    for error in (RuntimeError("I/O error: No space left on device (os error 28)"), CheckpointException()):
        assert "(No space left on device)" in str(disk_refusal(error, "runs"))
    assert user_error(CheckpointException()) is not None
    assert user_error(PermissionError(errno.EACCES, "reading")) is None
    assert disk_refusal(UserError("p", 1, "2"), "runs") is None
    with pytest.raises(ZeroDivisionError), written_atomically("/tmp/never"):
        _ = 1 / 0


def test_reads_plain_values_only(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(PLAIN | {"path": Path("x")}, path)
    for read in (AtomicCheckpointIO().load_checkpoint, lambda path: check_checkpoint("ckpt_path", path)):
        with pytest.raises(UserError, match=r"ckpt_path: .*plain values and tensors, or --weights_only false"):
            read(path)
    assert AtomicCheckpointIO().load_checkpoint(path, weights_only=False)["path"] == Path("x")
    assert check_checkpoint("ckpt_path", path, weights_only=False) == {}


# ---- with a Trainer ---------------------------------------------------------------------------------------------


def test_a_users_own_way_of_writing_wins() -> None:
    class Mine(TorchCheckpointIO):
        pass

    for own in (Mine(), AsyncCheckpointIO(Mine())):
        trainer = bare_trainer(plugins=[own])
        write_whole_checkpoints(trainer)
        assert trainer.strategy.checkpoint_io is own
    for strategy in (DDPStrategy(), SingleDeviceStrategy(torch.device("cpu"))):
        trainer = bare_trainer(strategy=strategy)
        write_whole_checkpoints(trainer)
        assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)


def sharded_run(folder: Path) -> None:
    """One step on one rank of FSDP2, a checkpoint, another step, and death when all but the last file is written."""

    class Sharded(Tiny):
        def configure_model(self) -> None:
            from torch.distributed.fsdp import fully_shard

            loaded = self.is_loaded
            super().configure_model()
            if not loaded:
                fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                shutil.copytree(folder / "a.ckpt", folder / "copy")
                torch.save = die
            trainer.save_checkpoint(folder / "a.ckpt", weights_only=False)

    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, process_group_backend="gloo")
    trainer = bare_trainer(3, strategy=strategy, callbacks=[Saves()])
    write_whole_checkpoints(trainer)
    trainer.fit(Sharded(), Toy())


def test_folders_of_shards(tmp_path: Path) -> None:
    killed(lambda: sharded_run(tmp_path))
    whole = tmp_path / "a.ckpt"
    assert check_checkpoint("ckpt_path", whole)["global_step"] == 1
    assert {".metadata", "meta.pt", "__0_0.distcp"} == names(whole)
    for name in names(whole):
        content = (whole / name).read_bytes()
        assert content == (tmp_path / "copy" / name).read_bytes()
        (whole / name).unlink()  # what a killed process leaves that writes in place
        with pytest.raises(UserError, match="a complete checkpoint of fit"):
            check_checkpoint("ckpt_path", whole)
        (whole / name).write_bytes(content[:-50])
        with pytest.raises(UserError, match="a complete checkpoint of fit"):
            check_checkpoint("ckpt_path", whole)
        (whole / name).write_bytes(content)
    refused = fit(tmp_path / "run", *SHORT, "--ckpt_path", whole)
    assert refused.status == 2
    assert "a file: only strategies that shard" in refused.err


class Every(Callback):
    """A checkpoint of every step, the last one too."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"{trainer.global_step}.ckpt", weights_only=False)


def test_a_run_that_had_reached_its_threshold_ends_there_again(tmp_path: Path) -> None:
    def run(resume: Path | None) -> tuple[Any, ...]:
        L.seed_everything(0, verbose=False)
        module = Tiny(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
        watch = NeuronAttributionCallback(4, every_n_steps=1, write=False)
        stop = ForgetThresholdStopping("probability", 0.1, unknown="warn")
        trainer = bare_trainer(20, callbacks=[watch, stop, Every()], default_root_dir=tmp_path)
        trainer.fit(module, Toy(), ckpt_path=resume)
        assert stop.stopped
        return weights(module), watch.history, stop.value, trainer.global_step

    whole = run(None)
    assert 1 < whole[-1] < 20
    again = run(tmp_path / f"{whole[-1]}.ckpt")
    assert equal(whole[0], again[0])
    assert whole[1:] == again[1:]


def test_the_newest_checkpoint_is_kept_and_none_of_an_earlier_run(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step=9.ckpt").touch()
    seen = []

    class Looks(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            seen.append(names(folder))

    keep = KeepCheckpoints(1)
    trainer = bare_trainer(4, callbacks=[keep, Looks()], enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.fit(Tiny(), Toy())
    assert seen == [{"step=9.ckpt"}, {"step=1.ckpt"}, {"step=2.ckpt"}, {"step=3.ckpt"}]
    assert names(folder) == {"step=3.ckpt"}  # the fourth step is the last: going on from there would end at once


# ---- the command ------------------------------------------------------------------------------------------------

DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "a flipped bit": lambda path: path.write_bytes(bytes(b ^ (i == 5000) for i, b in enumerate(path.read_bytes()))),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("step 3"),
    "weights alone": lambda path: torch.save({"a": torch.zeros(1)}, path),
    "an empty directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_checkpoint_that_is_none(name: str, tmp_path: Path) -> None:
    path = tmp_path / "step=3.ckpt"
    AtomicCheckpointIO().save_checkpoint(PLAIN, path)
    assert check_checkpoint("ckpt_path", path)["global_step"] == 3
    DAMAGE[name](path)
    with pytest.raises(UserError, match=r"ckpt_path: got .*step=3\.ckpt', allowed: a complete checkpoint of fit"):
        check_checkpoint("ckpt_path", path)


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint(PLAIN, tmp_path / "step=3.ckpt")
    with pytest.raises(UserError, match=r"an existing checkpoint; the newest there is .*step=3\.ckpt"):
        check_checkpoint("ckpt_path", tmp_path / "step=4.ckpt")
    refused = fit(tmp_path / "run", *SHORT, "--ckpt_path", tmp_path / "no.ckpt")
    assert refused.status == 2
    assert refused.err.splitlines()[-1].startswith("lightning-ssiuu: error: ckpt_path: got ")
    assert not (tmp_path / "run").exists()


def test_full_disk_during_a_run_which_then_goes_on(tmp_path: Path) -> None:
    """At a checkpoint, and then when results are written."""
    quick = (*SHORT, "--attribution.probe_examples", "0", "--trainer.max_steps", "4")
    options = (*quick, "--checkpoints.every_n_steps", "1", "--trainer.callbacks")
    root, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    full = fit(root, *options, f"{__name__}.Fills", "--trainer.callbacks.step", "2")
    assert full.status == 2
    told = (
        f"lightning-ssiuu: error: output directory: got '{folder}', allowed: one that can be written (File too large)"
    )
    assert full.err.splitlines()[-1] == told
    assert "Traceback" not in full.err
    assert names(folder) == {"step=2.ckpt"}

    refused = fit(root, *options, "[]")
    assert refused.status == 2
    assert "a directory without checkpoints/step=2.ckpt, --ckpt_path last to go on, or --overwrite" in refused.err

    full = fit(root, *options, f"{__name__}.Fills", "--ckpt_path", "last")
    assert full.status == 2
    assert full.err.splitlines()[-1] == told.replace("/checkpoints'", "'")
    assert names(folder) == {"step=3.ckpt"}
    assert not {"model", "metrics.json"} & names(root)

    assert fit(root, *options, "[]", "--ckpt_path", "last").status == 0
    assert {"model", "metrics.json"} <= names(root)
    assert not [name for name in names(root) | names(folder) if "partial" in name]

    again = fit(root, *options, "[]", "--ckpt_path", "last")
    assert again.status == 2
    assert "a directory without model, or --overwrite" in again.err
    end = fit(tmp_path / "other", *quick, "--trainer.max_steps", "3", "--ckpt_path", folder / "step=3.ckpt")
    assert "one from before the end of the run: it has 3 of trainer.max_steps behind it" in end.err


def test_newest_of_nothing(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "no") is None
