"""A run that was interrupted anywhere ends with the bits of one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toys.models import equal, weights
from toys.training import FewFacts, gpt2_with_dropout, ssiuu

from lightning_ssiuu.callbacks import ForgetThresholdStopping, NeuronAttributionCallback
from lightning_ssiuu.callbacks.elicited import ElicitedStop

STEPS = 5  # three batches an epoch


def run(checkpoint: str, folder: Path, resume: Path | None = None, accumulate: int = 1, workers: int = 0) -> Any:
    """Train ``STEPS`` steps, keeping a checkpoint of every step of the first run."""
    L.seed_everything(0 if resume is None else 1, verbose=False)
    module = ssiuu(checkpoint=checkpoint)
    watch = NeuronAttributionCallback(4, every_n_steps=1, write=False)
    never = ElicitedStop(steps=2, every_n_steps=2, looks=STEPS + 1)
    stop = ForgetThresholdStopping("probability", 80.0, unknown="warn", elicited=never)
    keep = [] if resume else [ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)]
    trainer = L.Trainer(
        max_steps=STEPS,
        max_epochs=-1,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        callbacks=[watch, stop, *keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=resume is None,
        default_root_dir=folder,
        check_val_every_n_epoch=1_000_000,
    )
    data = FewFacts(12, tokenizer=checkpoint, num_workers=workers)
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    assert trainer.global_step == STEPS
    assert stop.elicited_value is not None
    return weights(module), watch.history, (stop.value, stop.state_dict())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("dropout", "accumulate", "workers"), [(False, 1, 0), (False, 2, 0), (True, 1, 1)])
def test_resumed_anywhere_equals_uninterrupted(dropout: bool, accumulate: int, workers: int, tmp_path: Path) -> None:
    checkpoint = gpt2_with_dropout(tmp_path / "gpt2") if dropout else "tiny"
    whole, history, value = run(checkpoint, tmp_path / "whole", accumulate=accumulate, workers=workers)
    saved = sorted((tmp_path / "whole").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    assert len(saved) == STEPS
    assert torch.load(saved[0], weights_only=True)["regularizer"]["anchor"] is not None  # plain values only
    # In the middle of an epoch, at its end and at the beginning of one; workers take time to start.
    for path in saved[1:-1] if workers else saved[:-1]:
        again, history_again, value_again = run(checkpoint, tmp_path / "again", path, accumulate, workers)
        assert equal(whole, again), path.stem
        assert history_again == history, path.stem
        assert value_again == value
