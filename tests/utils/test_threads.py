"""The number of threads follows the work, the cores and the run's first part; what the user sets stays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from toys.training import FewFacts, adam

from lightning_ssiuu.callbacks.threads import Threads
from lightning_ssiuu.evaluation.loaders import tokens_of_a_pass
from lightning_ssiuu.objectives.gradient_difference import GradientDifference
from lightning_ssiuu.utils import threads


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a command whose user has decided nothing."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_known", set())
    monkeypatch.setenv(threads._MARK, "auto")
    before = torch.get_num_threads()
    threads.remember_threads()
    yield
    torch.set_num_threads(before)


def test_as_many_as_the_work_is_worth() -> None:
    worth = threads.WORTH_A_THREAD
    assert [threads.threads_for(1000, n * worth // 1000, 4) for n in (0, 1, 2, 3, 4, 9)] == [1, 1, 2, 3, 4, 4]


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "250000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
    ],
)
def test_cores(files: dict[str, str], quota: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(threads, "_CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert threads.cores() == (quota or 8)
    assert threads.cores(3) == max(1, (quota or 8) // 3)


def test_waiting_threads_sleep_unless_the_user_says_otherwise() -> None:
    environment: dict[str, str] = {}
    threads.wait_passively(environment)
    assert environment == {"OMP_WAIT_POLICY": "PASSIVE", threads._MARK: "auto"}
    environment = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "3"}
    threads.wait_passively(environment)
    assert environment == {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize(
    ("given", "decides"), [("", False), ("0", False), ("many", False), ("2,1", True), (" 4", True)]
)
def test_what_openmp_ignores_decides_nothing(given: str, decides: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"OMP_NUM_THREADS": given}
    threads.wait_passively(environment)
    assert (threads._MARK not in environment) == decides
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setenv(threads._MARK, "auto")
    monkeypatch.setattr(threads, "_known", {torch.get_num_threads()})
    assert threads.are_free()


@pytest.mark.usefixtures("free")
def test_the_users_number_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda _: 4)
    assert "threads: 3 of 4" in str(threads.choose_threads(1000, 3 * threads.WORTH_A_THREAD // 1000, 1))
    assert torch.get_num_threads() == 3
    assert threads.are_free()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # Lightning, for the processes it starts
    torch.set_num_threads(2)
    assert threads.choose_threads(1, 1, 1) is not None
    assert torch.get_num_threads() == 1
    torch.set_num_threads(4)  # a module of the user's
    assert threads.choose_threads(1, 1, 1) is None
    assert torch.get_num_threads() == 4
    monkeypatch.delenv(threads._MARK)  # OMP_NUM_THREADS from the beginning, or no command of ours
    threads.remember_threads()
    assert not threads.are_free()


class Seen(L.Callback):
    def __init__(self) -> None:
        self.numbers: list[int] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.numbers.append(torch.get_num_threads())


@pytest.mark.usefixtures("free")
def test_a_run_goes_on_with_its_first_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = FewFacts()
    parameters = sum(p.numel() for p in _loaded().parameters())
    monkeypatch.setattr(threads, "WORTH_A_THREAD", parameters * tokens_of_a_pass(data) // 2)
    given: dict[str, Any] = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path}
    given |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    monkeypatch.setattr(threads, "cores", lambda _: 8)
    seen = Seen()
    trainer = L.Trainer(max_steps=1, callbacks=[Threads(), seen], **given)
    trainer.fit(GradientDifference(optimizer=adam), datamodule=data)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    monkeypatch.setattr(threads, "cores", lambda _: 1)  # elsewhere, or beside other work
    trainer = L.Trainer(max_steps=2, callbacks=[Threads(), seen], **given)
    trainer.fit(GradientDifference(optimizer=adam), datamodule=FewFacts(), ckpt_path=tmp_path / "first.ckpt")
    assert seen.numbers == [2, 2]
    trainer = L.Trainer(max_steps=1, callbacks=[Threads(), seen], **given)
    trainer.fit(GradientDifference(optimizer=adam), datamodule=FewFacts())
    assert seen.numbers == [2, 2, 1]


def _loaded() -> torch.nn.Module:
    module = GradientDifference()
    module.configure_model()
    return module.model
