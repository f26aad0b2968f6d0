"""benchmarks/peer_parity.py without the checkout it needs, and with something else in its place."""

from __future__ import annotations

import copy
import runpy
import sys
from pathlib import Path

import pytest
import torch
from peer_code import PeerStep, imported, rank_auc
from peer_tables import Table, relative
from toys.models import batch, distance, random_model, weights

from lightning_ssiuu.evaluation.metrics.membership import membership_auc

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "peer_parity.py"
#: By file under src, of a checkout that knows one method; COMPUTE is what its revision calls the loss.
STAND_IN = {
    "trainer/utils.py": "SCALE = 2.0\n",
    "trainer/unlearn/grad_diff.py": (
        "from trainer.unlearn.base import UnlearnTrainer\n"
        "from trainer.utils import SCALE\n\n\n"
        "class GradDiff(UnlearnTrainer):\n"
        "    def COMPUTE(self, model, inputs, return_outputs=False):\n"
        "        return SCALE * self.alpha * model(**inputs['retain']).loss\n"
    ),
    "evals/metrics/utils.py": "from data.utils import IGNORE_INDEX\n\n\ndef ignored():\n    return IGNORE_INDEX\n",
}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit status, in this process: it has the libraries already."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
            return 1
        return stopped.code or 0
    return 0


def test_it_says_that_it_is_skipped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch) == 0
    assert capsys.readouterr().out == "skipped: no checkout of open-unlearning was given (--peer DIR)\n"


def test_a_folder_without_the_peer_s_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--peer", tmp_path) == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1].startswith(f"error: --peer: got {str(tmp_path)!r}, allowed: a checkout")
    assert shown.out == ""


@pytest.mark.parametrize("name", ["compute_loss", "compute_unlearn_loss"])
def test_a_step_is_clipped_descent_on_the_mean_of_its_batches(name: str, tmp_path: Path) -> None:
    for file, text in STAND_IN.items():
        (tmp_path / "src" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / file).write_text(text.replace("COMPUTE", name), encoding="utf-8")
    some = [{"retain": {k: v for k, v in batch(n)["retain"].items() if k != "example_id"}} for n in range(2)]
    hf, before = random_model(num_hidden_layers=1), set(sys.modules)
    own = copy.deepcopy(hf)
    loss = sum(2.0 * 3.0 * own(**one["retain"]).loss for one in some) / 2
    gradients = torch.autograd.grad(loss, list(own.parameters()))
    norm = torch.stack([g.norm() for g in gradients]).norm()
    assert norm > 1
    with imported(tmp_path) as class_named:
        assert class_named("evals.metrics.utils.ignored")() == -100
        PeerStep(class_named, "GradDiff", hf, torch.optim.SGD(hf.parameters(), lr=0.5), alpha=3.0)(*some)
    expected = [p - 0.5 * g / norm for p, g in zip(weights(own), gradients, strict=True)]
    assert distance(weights(hf), expected) < 1e-5
    assert not {one for one in set(sys.modules) - before if one.split(".")[0] in ("trainer", "evals", "data")}


@pytest.mark.parametrize(("difference", "note", "agrees"), [(0.0, "", True), (0.5, "rounding", True), (0.5, "", False)])
def test_a_difference_needs_a_reason(
    difference: float, note: str, agrees: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table("what", "ours", "theirs", "difference")
    table.row(["loss"], [1.0, 1.5], [0.0, difference], note, 1e-3, "said in any case")
    assert table.agrees is agrees
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("| loss | 1 | 1.5 | 0.0e+00 |")
    assert ("NOT EXPECTED" in last) is not agrees
    assert "said in any case" in last


def test_a_nan_is_a_difference() -> None:
    value = relative(torch.tensor([float("nan")]), torch.tensor([1.0]))
    table = Table("ours")
    table.row([], [1.0], [0.0, value], "", 1.0)
    assert not table.agrees
    assert relative(torch.zeros(2), torch.zeros(2)) == 0.0


def test_the_auc_that_stands_in_for_scikit_learn_s() -> None:
    members, others = torch.tensor([-3.0, 0.5, 2.0]), torch.tensor([0.5, 7.0])
    labels = [0, 0, 0, 1, 1]  # as the peer has it: higher for others
    found = rank_auc(labels, torch.cat([members, others]).numpy())
    assert found == pytest.approx(membership_auc(others, members), rel=1e-6)
