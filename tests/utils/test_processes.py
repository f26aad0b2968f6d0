"""A rank that dies ends the run with its error: soon, all of it, and told once."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from toys.cli import DEFAULT, FAST
from toys.data import Toy
from toys.models import answer_model, bare_trainer
from toys.ranks import End, ranks

from lightning_ssiuu import __main__
from lightning_ssiuu.callbacks import ForgetThresholdStopping
from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.utils import processes as together
from lightning_ssiuu.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("few_facts")

LIMIT = 60  # seconds in which a run of seconds must have ended, on a machine with better things to do


class Tiny(GradientDifference):
    """A random model over bytes."""

    def configure_model(self) -> None:
        if not self.is_loaded:
            self.adopt(answer_model(vocab_size=260, max_position_embeddings=64).train(), Toy().tokenizer)


class Dies(Callback):
    """Lets ranks die in the second step, or from then on in the next call of a collective."""

    def __init__(self, how: dict[int, str], collective: str | None = None, workers: int = 0) -> None:
        self.how, self.collective, self.workers = how, collective, workers

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_rank in self.how and trainer.global_step == 1:
            die = partial(self.die, self.how[trainer.global_rank])
            if self.collective is None:
                die()
            setattr(dist, self.collective, die)

    @staticmethod
    def die(how: str, *_: Any, **__: Any) -> None:
        if how == "raise":
            raise ArithmeticError("this rank is ill")
        if how == "mistake":
            raise UserError("data", 1, "what only this rank has")
        if how in ("kill", "terminate"):
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGTERM)
        if how == "terminate all":
            os.killpg(0, signal.SIGTERM)
        time.sleep(10 * LIMIT)


def train(dies: Dies, seconds: float) -> None:
    """What the command line does around a Trainer."""
    together.end_with_parent()
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=seconds))
    callbacks = [ForgetThresholdStopping("probability", 0.0, unknown="warn"), dies]
    trainer = bare_trainer(4, strategy=strategy, devices=2, callbacks=callbacks)
    with together.EndTogether.around(trainer):
        trainer.fit(Tiny(), Toy(batch_size=4, num_workers=dies.workers))


def ended(folder: Path, how: dict[int, str], collective: str | None = None, seconds: float = 600) -> End:
    """Run the command on two ranks."""
    end = ranks(partial(__main__._run, partial(train, Dies(how, collective), seconds)), folder, LIMIT)
    assert end.left == []
    assert end.status != 0
    return end


def members(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, *_, own = stat.read_text().rpartition(")")[2].split()[:4]
            found += [int(stat.parent.name)] if int(own) == session and state != "Z" else []
    return found


def told(end: End) -> list[str]:
    return [line for line in end.err.splitlines() if "error: " in line.lower()]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(__main__, "_PATIENCE", 1.0)
    for name in ("_DYING", "_NOTICING"):
        monkeypatch.setattr(together, name, 1.0)
    # How often a worker looks whether its rank is still there; five seconds otherwise.
    monkeypatch.setattr("torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL", 0.5)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises(rank: int, tmp_path: Path) -> None:
    end = ended(tmp_path, {rank: "raise"})
    assert end.status == 1
    assert end.err.count("ArithmeticError: this rank is ill") == 1


@pytest.mark.parametrize("collective", [None, "all_gather", "all_reduce"])  # a step; the stopping score; g
def test_a_rank_that_is_killed(collective: str | None, tmp_path: Path) -> None:
    end = ended(tmp_path, {1: "kill"}, collective)
    assert "rank 1 was killed (SIGKILL)" in end.err


def test_a_rank_that_is_killed_where_the_first_does_not_notice(tmp_path: Path) -> None:
    end = ended(tmp_path, {0: "hang", 1: "kill"})  # as NCCL's waiting does not
    assert end.status == 1
    assert told(end) == ["lightning-ssiuu: error: rank 1 was killed (SIGKILL)"]


def test_no_rank_outlives_the_first(tmp_path: Path) -> None:
    assert ended(tmp_path, {0: "kill", 1: "hang"}).status == -signal.SIGKILL


def test_a_rank_that_hangs_ends_with_the_process_groups_timeout(tmp_path: Path) -> None:
    end = ended(tmp_path, {1: "hang"}, seconds=3)
    assert end.status == 1
    assert "timed out" in end.err.lower()


@pytest.mark.parametrize("how", ["terminate", "terminate all"])
def test_sigterm_ends_ranks_and_their_workers_with_143(how: str, tmp_path: Path) -> None:
    def command() -> int:
        if "LOCAL_RANK" not in os.environ:
            os.setsid()
            (tmp_path / "session").write_text(str(os.getpid()))
        return __main__._run(partial(train, Dies({0: how}, workers=1), 600))

    end = ranks(command, tmp_path / "ranks", LIMIT)
    assert (end.status, end.left) == (143, [])
    assert end.err.splitlines()[-1] == "lightning-ssiuu: ended by SIGTERM"
    assert "Traceback" not in end.err
    last = time.monotonic() + LIMIT
    while members(int((tmp_path / "session").read_text())) and time.monotonic() < last:
        time.sleep(0.1)
    assert members(int((tmp_path / "session").read_text())) == []


def test_sigterm_of_another_rank_than_the_first(tmp_path: Path) -> None:
    assert ended(tmp_path, {0: "hang", 1: "terminate"}).status == 143


def test_a_mistake_that_only_one_rank_sees(tmp_path: Path) -> None:
    end = ended(tmp_path, {1: "mistake"})
    assert end.status == 2
    assert told(end) == ["lightning-ssiuu: error: rank 1: data: got 1, allowed: what only this rank has"]


def test_a_mistake_that_all_ranks_see_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(__main__, "_PATIENCE", 1e3)
    kill = together._kill
    monkeypatch.setattr(together, "_kill", lambda others: (time.sleep(len(others) / 2), kill(others)))  # time to say it
    options = ("--trainer.strategy", "ddp", "--trainer.accelerator", "cpu", "--trainer.devices", "2")
    met = ("--stopping.score", "probability", "--stopping.threshold", "99")
    where = ("--trainer.default_root_dir", str(tmp_path / "run"))
    command = ["fit", "--config", str(DEFAULT), *FAST, *options, *met, *where]
    end = ranks(partial(__main__.main, command), tmp_path / "ranks", LIMIT)
    assert (end.status, end.left) == (2, [])
    assert [line.partition(": got ")[0] for line in told(end)] == ["lightning-ssiuu: error: stopping.threshold"]
    assert not (tmp_path / "run").exists()
