"""What a new run may replace, and what an interrupted one goes on from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from toys.cli import DEFAULT, RECIPES, SHORT, fit

from lightning_ssiuu import PDU
from lightning_ssiuu.cli.resume import refuse_to_lose
from lightning_ssiuu.training.checkpoints import newest_checkpoint
from lightning_ssiuu.utils.errors import UserError


def test_what_a_new_run_may_replace(tmp_path: Path) -> None:
    config = SimpleNamespace(
        overwrite=False,
        saving=SimpleNamespace(folder="model", get=lambda _: None),
        checkpoints=SimpleNamespace(folder="checkpoints"),
    )

    def refused(text: str, ckpt_path: str | None = None) -> str:
        try:
            refuse_to_lose(config, tmp_path, ckpt_path, lambda: text)
        except UserError as error:
            return error.allowed
        return ""

    assert refused("a: 1") == ""
    (tmp_path / "config.yaml").write_text("a: 1")
    (tmp_path / "plots").mkdir()
    assert refused("a: 1") == ""  # the same run, interrupted before it had a checkpoint
    assert "without plots" in refused("a: 2") or "without config.yaml" in refused("a: 2")
    assert "--ckpt_path to go on" in refused("a: 2")
    assert refused("a: 2", "some.ckpt") == ""
    (tmp_path / "metrics.json").touch()
    for ckpt_path in (None, "some.ckpt"):
        assert refused("a: 1", ckpt_path) == "a directory without metrics.json, or --overwrite"
    config.overwrite = True
    assert refused("a: 2") == ""


def test_a_checkpoint_without_the_states_to_go_on_with_is_refused(tmp_path: Path) -> None:
    """Of an earlier version, or of another objective or regulariser: it would go on as if they were new."""
    pdu, longer = RECIPES / "objective" / "pdu.yaml", (*SHORT, "--trainer.max_steps", "4")
    root = tmp_path / "run"
    assert fit(root, *SHORT, "--checkpoints.every_n_steps", "1", recipe=pdu).status == 0
    kept = newest_checkpoint(root / "checkpoints")
    assert kept is not None
    content = torch.load(kept, weights_only=True)
    assert set(content["objective"]) == set(PDU().state())
    content["dual"] = content.pop("objective")  # where an earlier version had it
    torch.save(content, tmp_path / "old.ckpt")
    for recipe, given in ((pdu, tmp_path / "old.ckpt"), (DEFAULT, kept)):
        refused = fit(tmp_path / "other", *longer, "--ckpt_path", given, recipe=recipe)
        assert refused.status == 2
        assert f"ckpt_path: got '{given}', allowed: a checkpoint with the" in refused.err.splitlines()[-1]
        assert not (tmp_path / "other").exists()
    assert fit(tmp_path / "other", *longer, "--ckpt_path", kept, recipe=pdu).status == 0
