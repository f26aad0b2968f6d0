"""``fit``, ``validate`` and ``test``: a LightningCLI whose recipes compose."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from lightning_ssiuu.callbacks import (
    ForgetThresholdStopping,
    KeepCheckpoints,
    NeuronAttributionCallback,
    RunReport,
    SavePretrained,
)
from lightning_ssiuu.cli.memory import estimate_memory, print_estimate
from lightning_ssiuu.cli.resume import checkpoint_mistakes, checkpoint_to_go_on_from, config_text, refuse_to_lose
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.models.loading import context_length, resolve_checkpoint
from lightning_ssiuu.objectives import UnlearningModule, objectives
from lightning_ssiuu.training.checkpoints import write_whole_checkpoints
from lightning_ssiuu.training.fsdp import use_all_devices
from lightning_ssiuu.training.strategies import check_engine, check_strategy
from lightning_ssiuu.utils.console import hide_short_bars, quiet
from lightning_ssiuu.utils.errors import Given, UserError, check_at_least
from lightning_ssiuu.utils.files import check_space, nothing_left, written_atomically
from lightning_ssiuu.utils.messages import parsing, trainer_mistakes
from lightning_ssiuu.utils.processes import EndTogether, end_with_parent
from lightning_ssiuu.utils.waiting import release


class SaveConfig(SaveConfigCallback):
    """Writes the resolved ``config.yaml`` to the run directory after the first batch, so not for a refused run."""

    text: str | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pass  # the data and the threshold have not been checked yet

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.text = config_text(self.parser, self.config)
        for callback in getattr(trainer, "callbacks", ()):
            if isinstance(callback, RunReport):
                callback.config_text = self.text  # of which it writes the digest

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        release()
        if self.text is not None and trainer.is_global_zero:
            with written_atomically(Path(trainer.default_root_dir) / "config.yaml") as temporary:
                temporary.write_text(self.text, encoding="utf-8")
        self.text = None


class UnlearningCLI(LightningCLI):
    """LightningCLI with this package's callbacks as sections of their own, which recipes set one by one.

    A YAML list is replaced as a whole when recipes are composed; sections are merged key by key. Hence
    ``attribution:``, ``stopping:``, ``saving:``, ``checkpoints:`` and ``report:`` instead of entries under
    ``trainer.callbacks``.
    """

    ckpt_path: Any = None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(NeuronAttributionCallback, "attribution")
        parser.add_lightning_class_args(ForgetThresholdStopping, "stopping")
        parser.add_lightning_class_args(SavePretrained, "saving")
        parser.add_lightning_class_args(RunReport, "report")
        parser.add_class_arguments(KeepCheckpoints, "checkpoints")
        parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run")
        parser.link_arguments("model.init_args.checkpoint", "data.init_args.tokenizer")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            text = "print what each device will need; load, train and write nothing"
            parser.add_argument("--estimate-memory", "--estimate_memory", action="store_true", help=text)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        with parsing():
            self.config = parser.parse_args(args)  # Lightning's own would warn that sys.argv holds the same

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if not isinstance(seed, bool) and isinstance(seed, int) and not 0 <= seed < 1 << 32:
            raise UserError("seed_everything", seed, f"a number from 0 to {(1 << 32) - 1}, true or false")
        super()._set_seed()

    def instantiate_classes(self) -> None:
        with parsing():
            super().instantiate_classes()

    def before_instantiate_classes(self) -> None:
        check_engine(self._get(self.config, "trainer", default={}))
        seed, options = self._get(self.config, "seed_everything"), self._get(self.config, "data").init_args
        if options.get("seed", 0) is None and isinstance(seed, int):
            # The run's seed orders the data, too, and config.yaml has the number. True: a seed of Lightning's choice.
            options["seed"] = int(os.environ["PL_GLOBAL_SEED"]) if seed is True else int(seed)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        checkpoints = self._get(self.config_init, "checkpoints")
        if checkpoints.every_n_steps is not None:
            # Not one of the callback sections: a Trainer that keeps no checkpoints refuses a callback that could.
            given = self._get(self.config_init, "trainer", default={}).get("callbacks") or []
            callbacks = given if isinstance(given, list) else [given]
            kwargs |= {"callbacks": [*callbacks, checkpoints], "enable_checkpointing": True}
        accumulated = self._get(self.config_init, "trainer", default={}).get("accumulate_grad_batches")
        if accumulated is not None:
            check_at_least("trainer.accumulate_grad_batches", accumulated, 1)
        with trainer_mistakes(self._get(self.config, "trainer", default={})):
            trainer = super().instantiate_trainer(**kwargs)
        use_all_devices(trainer.strategy)
        write_whole_checkpoints(trainer)
        return trainer

    def _parse_ckpt_path(self) -> None:
        pass  # Lightning would read the whole checkpoint, to let its hyperparameters win over the configuration

    def before_fit(self) -> None:
        config, root = self.config.fit, self.trainer.default_root_dir
        if method := self.model.unwritten():
            raise UserError("model", type(self.model).__name__, f"an objective that defines {method}(batch)")
        check_strategy(self.trainer, self.model)
        self.ckpt_path = checkpoint_to_go_on_from(config, self.trainer, self.model)
        if not config.estimate_memory:  # which may be asked beside the results of an earlier run
            refuse_to_lose(config, root, self.ckpt_path, lambda: config_text(self._parser("fit"), config))
        # How much the model takes is asked again when it is known; a directory that cannot be written is told now.
        check_space("trainer.default_root_dir", root, 1 << 20)
        for name, least in (("max_epochs", self.trainer.max_epochs), ("max_steps", self.trainer.max_steps)):
            if least == 0:
                raise UserError(f"trainer.{name}", 0, "a number ≥ 1, or -1 for no limit")
        try:
            self.model.optimizer([torch.nn.Parameter(torch.zeros(1))])
        except (TypeError, ValueError) as error:  # what torch's optimisers raise for a rate below 0 and the like
            raise UserError("model.optimizer", Given("what it refuses"), " ".join(str(error).split())) from error
        self._before_any()

    def before_validate(self) -> None:
        self.ckpt_path = checkpoint_to_go_on_from(self.config[self.subcommand], self.trainer)
        self._before_any()

    before_test = before_validate

    def fit(self, **kwargs: Any) -> None:
        if self.config.fit.estimate_memory:
            print_estimate(estimate_memory(self.model, self.datamodule, self.trainer))
            return
        self._run(self.trainer.fit, kwargs)

    def validate(self, **kwargs: Any) -> None:
        self._run(self.trainer.validate, kwargs)

    def test(self, **kwargs: Any) -> None:
        self._run(self.trainer.test, kwargs)

    def _run(self, function: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        with (
            nothing_left(self.trainer.default_root_dir),
            EndTogether.around(self.trainer),
            checkpoint_mistakes(self.ckpt_path),
        ):
            function(**kwargs | {"ckpt_path": self.ckpt_path})

    def _before_any(self) -> None:
        checkpoint = resolve_checkpoint(self.model.checkpoint)
        hide_short_bars(checkpoint)
        limit = context_length(checkpoint) if os.path.isdir(checkpoint) else None  # a hub id is not downloaded for this
        encoder = self.datamodule.encoder
        if limit is not None and encoder.max_length > limit:  # a tokenizer need not know its model's context
            if self.datamodule.max_length is not None:
                raise UserError("data.max_length", self.datamodule.max_length, f"at most {limit}, the model's context")
            encoder.max_length = limit
        self.datamodule.setup()


def run(args: list[str]) -> None:
    """Parse and run ``fit``, ``validate`` or ``test``."""
    end_with_parent()
    objectives()  # imports every file, so that class_path may be a bare class name
    # Tokenising is done once, before any worker process exists; the library would warn about forking all the same.
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
    # The parsers of the subcommands that are not asked for would take a good third of the time of parsing.
    only: dict[str, Any] = {"subcommands": staticmethod(lambda: {args[0]: LightningCLI.subcommands()[args[0]]})}
    with quiet():
        type("UnlearningCLI", (UnlearningCLI,), only)(
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
