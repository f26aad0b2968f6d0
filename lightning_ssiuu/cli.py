"""``fit``, ``validate`` and ``test``: a LightningCLI whose recipes compose."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from lightning_ssiuu.callbacks import ForgetThresholdStopping, NeuronAttributionCallback, RunReport, SavePretrained
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.files import refuse_existing, written_atomically
from lightning_ssiuu.objectives import UnlearningModule, objectives


class SaveConfig(SaveConfigCallback):
    """Writes the resolved ``config.yaml`` to the run directory once training starts, so not for a refused run."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet: the data and the threshold have not been checked."""

    def on_train_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Write, and let the report hash what was written."""
        text = self.parser.dump(self.config, skip_none=False)
        for callback in trainer.callbacks:
            if isinstance(callback, RunReport):
                callback.config_text = text
        if trainer.is_global_zero:
            with written_atomically(Path(trainer.default_root_dir) / "config.yaml") as temporary:
                temporary.write_text(text, encoding="utf-8")


class UnlearningCLI(LightningCLI):
    """LightningCLI with this package's callbacks as sections of their own, so that recipes can set them one by one.

    A YAML list is replaced as a whole when recipes are composed; sections are merged key by key. Hence
    ``attribution:``, ``stopping:``, ``saving:`` and ``report:`` instead of entries under ``trainer.callbacks``.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer methods offered."""
        offered = LightningCLI.subcommands()
        return {name: offered[name] for name in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Sections for the callbacks, the tokenizer's link, ``--overwrite``."""
        parser.add_lightning_class_args(NeuronAttributionCallback, "attribution")
        parser.add_lightning_class_args(ForgetThresholdStopping, "stopping")
        parser.add_lightning_class_args(SavePretrained, "saving")
        parser.add_lightning_class_args(RunReport, "report")
        parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run")
        parser.link_arguments("model.init_args.checkpoint", "data.init_args.tokenizer")

    def before_fit(self) -> None:
        """Refuse to run into existing results before anything is loaded."""
        config = self.config.fit
        if config.get("ckpt_path") is None:
            names = [self.config.fit.saving.folder or "model", "metrics.json"]
            refuse_existing("trainer.default_root_dir", self.trainer.default_root_dir, names, config.overwrite)


def run(args: list[str]) -> None:
    """Run one Lightning subcommand.

    Args:
        args: ``["fit", "--config", ...]``.
    """
    objectives()  # imports every file, so that class_path may be a bare class name
    # A recipe's hub look-ups fail at once instead of after retries where there is no hub.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    defaults: dict[str, Any] = {
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        # Callbacks look at the model when they need to; a validation run per epoch would cost more than the training.
        "check_val_every_n_epoch": 1_000_000,
        "log_every_n_steps": 1,
    }
    UnlearningCLI(
        UnlearningModule,
        UnlearningDataModule,
        save_config_callback=SaveConfig,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        trainer_defaults=defaults,
        parser_kwargs={"exit_on_error": False},
        args=args,
    )
