"""``fit``, ``validate`` and ``test``: a LightningCLI whose recipes compose."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn

from lightning_ssiuu.callbacks import (
    ForgetThresholdStopping,
    KeepCheckpoints,
    NeuronAttributionCallback,
    RunReport,
    SavePretrained,
)
from lightning_ssiuu.callbacks.save_pretrained import ADAPTER_END
from lightning_ssiuu.callbacks.threads import Threads
from lightning_ssiuu.cli.config_files import ConfigFile, config_files
from lightning_ssiuu.cli.resume import (
    RESULTS,
    checkpoint_mistakes,
    checkpoint_to_go_on_from,
    config_text,
    refuse_to_lose,
)
from lightning_ssiuu.cli.settings import KEY, check_settings, run_settings
from lightning_ssiuu.cli.validation import (
    NEVER,
    callback_mistakes,
    check_callbacks,
    finished_run,
    print_scores,
    validation_options,
)
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.evaluation.results import check_folder
from lightning_ssiuu.models.checks import tokenizers_differ
from lightning_ssiuu.models.loading import context_length, load_tokenizer, resolve_checkpoint
from lightning_ssiuu.models.source import named
from lightning_ssiuu.objectives import UnlearningModule, objectives
from lightning_ssiuu.training.checkpoints import write_whole_checkpoints
from lightning_ssiuu.training.fsdp import use_all_devices
from lightning_ssiuu.training.optimizers import refusal
from lightning_ssiuu.training.schedules import make_schedule
from lightning_ssiuu.training.strategies import check_engine, check_strategy
from lightning_ssiuu.utils.console import hide_short_bars, quiet
from lightning_ssiuu.utils.errors import UserError, check_at_least
from lightning_ssiuu.utils.files import (
    check_space,
    nothing_left,
    print_written,
    refuse_links,
    same_place,
    written_atomically,
)
from lightning_ssiuu.utils.locks import only_here
from lightning_ssiuu.utils.messages import parsing, trainer_mistakes
from lightning_ssiuu.utils.processes import EndTogether, end_with_parent
from lightning_ssiuu.utils.threads import remember_threads
from lightning_ssiuu.utils.waiting import release

_INFLUENCE = "influence.csv"


class SaveConfig(SaveConfigCallback):
    """Writes the resolved ``config.yaml`` to the run directory after the first batch, so not for a refused run.

    What of it determines the run is also in every checkpoint, and has to be the same where a run goes on.
    """

    begun = False

    @cached_property
    def text(self) -> str:
        return config_text(self.parser, self.config)

    @cached_property
    def settings(self) -> dict[str, Any]:
        return run_settings(self.text)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pass  # the data and the threshold have not been checked yet

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for callback in getattr(trainer, "callbacks", ()):
            if isinstance(callback, RunReport):
                callback.config_text = self.text  # of which it writes the digest

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.begun:
            return
        release()
        if trainer.is_global_zero:
            with written_atomically(Path(trainer.default_root_dir) / "config.yaml") as temporary:
                temporary.write_text(self.text, encoding="utf-8")
        self.begun = True

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = self.settings

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Most were compared before anything was loaded; not what only Lightning finds or reads.
        if trainer.state.fn == TrainerFn.FITTING and KEY in checkpoint:
            check_settings(checkpoint[KEY], self.settings, trainer.ckpt_path or "")


class UnlearningCLI(LightningCLI):
    """LightningCLI with this package's callbacks as sections of their own, which recipes set one by one.

    A YAML list is replaced as a whole when recipes are composed; sections are merged key by key. Hence
    ``attribution:``, ``stopping:``, ``saving:``, ``checkpoints:`` and ``report:`` instead of entries under
    ``trainer.callbacks``.
    """

    ckpt_path: Any = None

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = LightningArgumentParser(**{"dump_header": [f"lightning.pytorch=={L.__version__}"]} | kwargs)
        text = "a YAML file with these options, or a recipe's name; may be given several times"
        parser.add_argument("-c", "--config", action=ConfigFile, type=config_files, help=text)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(NeuronAttributionCallback, "attribution")
        parser.add_lightning_class_args(ForgetThresholdStopping, "stopping")
        parser.add_lightning_class_args(SavePretrained, "saving")
        parser.add_lightning_class_args(RunReport, "report")
        parser.add_class_arguments(KeepCheckpoints, "checkpoints")
        parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run")
        names = ("model.init_args.checkpoint", "model.init_args.revision")
        parser.link_arguments(names, "data.init_args.tokenizer", compute_fn=named)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            text = "print what each device will need; load, train and write nothing"
            parser.add_argument("--estimate-memory", "--estimate_memory", action="store_true", help=text)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        with parsing():
            self.config = parser.parse_args(args)  # Lightning's own would warn that sys.argv holds the same
        is_named = any(
            str(arg).partition("=")[0].endswith(("model.init_args.checkpoint", "model.checkpoint")) for arg in args
        )
        config = self.config[self.config.subcommand]
        if self.config.subcommand != "fit" and not is_named and config.get("ckpt_path") is None:
            self._take_what_was_trained(config)

    def _take_what_was_trained(self, config: Any) -> None:
        # The configuration of a finished run names the model it began with; what it made is what is to be scored.
        if (model := finished_run(config)) is not None:
            config.model.init_args.checkpoint = config.data.init_args.tokenizer = str(model)
            # Merged and unpacked, and no hub's.
            config.model.init_args.lora = config.model.init_args.quantization = config.model.init_args.revision = None

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if not isinstance(seed, bool) and isinstance(seed, int) and not 0 <= seed < 1 << 32:
            raise UserError("seed_everything", seed, f"a number from 0 to {(1 << 32) - 1}, true or false")
        super()._set_seed()

    def _dump_config(self) -> None:
        if not hasattr(self, "config_dump"):  # Lightning's own would check again all that has been parsed
            options: dict[str, Any] = {"skip_link_targets": False, "skip_none": False, "skip_validation": True}
            text = self.parser.dump(self.config, format="yaml", **options)
            self.config_dump = yaml.safe_load(text)[self.config.subcommand]

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
        checkpoints, options = self._get(self.config_init, "checkpoints"), self._get(self.config_init, "trainer")
        given = options.get("callbacks") or []
        callbacks = given if isinstance(given, list) else [given]
        if checkpoints.every_n_steps is not None:
            # Not one of the callback sections: a Trainer that keeps no checkpoints refuses a callback that could.
            callbacks = [*callbacks, checkpoints]
        kwargs |= {"callbacks": [Threads(), *callbacks]} | validation_options(callbacks, options)
        if self.subcommand != "fit" and options.get("logger") in (None, True):
            kwargs["logger"] = False  # the scores are on the screen; a finished run stays as it is
        if (accumulated := options.get("accumulate_grad_batches")) is not None:
            check_at_least("trainer.accumulate_grad_batches", accumulated, 1)
        with trainer_mistakes(self._get(self.config, "trainer", default={})):
            trainer = super().instantiate_trainer(**kwargs)
        use_all_devices(trainer.strategy)
        write_whole_checkpoints(trainer)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        writes = subcommand == "fit" and not self.config.fit.estimate_memory and self.trainer.is_global_zero
        root = self.trainer.default_root_dir
        with only_here("trainer.default_root_dir", root) if writes else nullcontext():
            super()._run_subcommand(subcommand)

    def _parse_ckpt_path(self) -> None:
        pass  # Lightning would read the whole checkpoint, to let its hyperparameters win over the configuration

    def before_fit(self) -> None:
        config, root = self.config.fit, self.trainer.default_root_dir
        if method := self.model.unwritten():
            raise UserError("model", type(self.model).__name__, f"an objective that defines {method}(batch)")
        check_strategy(self.trainer, self.model)
        self._check_folders()
        text = cache(lambda: config_text(self._parser("fit"), config))
        self.ckpt_path = checkpoint_to_go_on_from(config, self.trainer, self.model, lambda: run_settings(text()))
        if not config.estimate_memory:  # which may be asked beside the results of an earlier run
            refuse_to_lose(config, root, self.ckpt_path, text)
        # How much the model takes is asked again when it is known; a directory that cannot be written is told now.
        check_space("trainer.default_root_dir", root, 1 << 20)
        for name, least in (("max_epochs", self.trainer.max_epochs), ("max_steps", self.trainer.max_steps)):
            if least == 0:
                raise UserError(f"trainer.{name}", 0, "a number ≥ 1, or -1 for no limit")
        try:
            optimizer = self.model.optimizer([torch.nn.Parameter(torch.zeros(1))])
        except (TypeError, ValueError) as error:  # what torch's optimisers raise for a rate below 0 and the like
            raise refusal("model.optimizer", error) from error
        if self.model.lr_scheduler is not None:
            make_schedule(self.model.lr_scheduler, optimizer, self.model.warmup_steps, lambda: 1)
        self._before_any()
        check_callbacks(self.trainer, self.model, self.datamodule)

    def before_validate(self) -> None:
        config = self.config[self.subcommand]
        self.ckpt_path = checkpoint_to_go_on_from(config, self.trainer)
        if self.ckpt_path is None and config.get("ckpt_path") is not None:  # fit would begin anew
            allowed = f"a checkpoint: there is none in {self.trainer.default_root_dir}"
            raise UserError("ckpt_path", config.ckpt_path, allowed)
        self._before_any()

    before_test = before_validate

    def fit(self, **kwargs: Any) -> None:
        if self.config.fit.estimate_memory:
            from lightning_ssiuu.cli.memory import estimate_memory, print_estimate

            print_estimate(estimate_memory(self.model, self.datamodule, self.trainer))
            return
        self._run(self.trainer.fit, kwargs)
        if self.trainer.is_global_zero:
            saved = self.config.fit.saving.folder
            models = [] if saved is None else [saved, f"{saved}{ADAPTER_END}"]
            print_written(self.trainer.default_root_dir, [*models, *RESULTS, _INFLUENCE])

    def validate(self, **kwargs: Any) -> None:
        self._score(self.trainer.validate, kwargs)

    def test(self, **kwargs: Any) -> None:
        self._score(self.trainer.test, kwargs)

    def _score(self, function: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        results = self._run(function, kwargs | {"verbose": False})
        if kwargs.get("verbose", True):
            print_scores(results, str(self.ckpt_path or self.model.checkpoint))

    def _run(self, function: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]

        def begun() -> bool:
            return any(isinstance(one, SaveConfig) and one.begun for one in callbacks)

        with (
            callback_mistakes(),
            nothing_left(self.trainer.default_root_dir, self._logs(), begun),
            EndTogether.around(self.trainer),
            checkpoint_mistakes(self.ckpt_path),
            self._limit_mistakes(),
        ):
            return function(**kwargs | {"ckpt_path": self.ckpt_path})

    @contextmanager
    def _limit_mistakes(self) -> Iterator[None]:
        # Only Lightning knows how many batches there are.
        try:
            yield
        except MisconfigurationException as error:
            found = re.search(r"increase the `(limit_\w+)` argument\. Try at least `\w+=([\d.]+)", str(error))
            if found is None:
                raise
            given = self.config[self.subcommand].trainer
            name = "overfit_batches" if given.overfit_batches else found[1]
            raise UserError(f"trainer.{name}", given[name], f"at least {found[2]}: one batch") from error

    def _logs(self) -> list[str]:
        # Directories of loggers, for which the first process writes; not all say where that is.
        return [logger.log_dir for logger in self.trainer.loggers if logger.log_dir and self.trainer.is_global_zero]

    def _check_folders(self) -> None:
        # Every folder that this run writes in its directory has a name of its own, and is no link to elsewhere.
        config, root = self.config.fit, Path(self.trainer.default_root_dir).absolute()
        logs = [Path(log).absolute() for log in self._logs()]
        taken = [log.relative_to(root).parts[0] for log in logs if log.is_relative_to(root) and log != root]
        check_folder("checkpoints.folder", config.checkpoints.folder, taken)
        if (saved := config.saving.folder) is not None:
            for name in (saved, f"{saved}{ADAPTER_END}"):
                check_folder("saving.folder", name, [*taken, config.checkpoints.folder])
                refuse_links("trainer.default_root_dir", root, [name])
            if same_place(root / saved, self.model.checkpoint):
                raise UserError("saving.folder", saved, "a folder that is not the checkpoint this run begins from")
        refuse_links("trainer.default_root_dir", root, [*RESULTS, _INFLUENCE, config.checkpoints.folder, *taken])

    def _before_any(self) -> None:
        self._check_limits()
        checkpoint = resolve_checkpoint(self.model.checkpoint)
        hide_short_bars(checkpoint)
        limit = context_length(checkpoint) if os.path.isdir(checkpoint) else None  # a hub id is not downloaded for this
        encoder = self.datamodule.encoder
        if self.datamodule.tokenizer_or_name != self.model.checkpoint:  # a data module that brings its own
            difference = tokenizers_differ(encoder.tokenizer, load_tokenizer(self.model.checkpoint))
            if difference is not None:
                allowed = f"data with the tokenizer of {self.model.checkpoint}, not {difference}"
                raise UserError("data.tokenizer", type(self.datamodule).__name__, allowed)
        if limit is not None and encoder.max_length > limit:  # a tokenizer need not know its model's context
            if self.datamodule.max_length is not None:
                raise UserError("data.max_length", self.datamodule.max_length, f"at most {limit}, the model's context")
            encoder.max_length = limit
        self.datamodule.setup()

    def _check_limits(self) -> None:
        # What Lightning takes for "nothing to do" ends as if all were well.
        if quick := self.config[self.subcommand].trainer.fast_dev_run:
            allowed = "false: its results would look like a run's. Use trainer.max_steps 1"
            raise UserError("trainer.fast_dev_run", quick, allowed)
        # fit cannot do without validation batches either, and says so.
        limits = {"fit": "limit_train_batches", "validate": "limit_val_batches", "test": "limit_test_batches"}
        name = limits[str(self.subcommand)]
        if getattr(self.trainer, name) == 0:
            raise UserError(f"trainer.{name}", 0, "a number of batches ≥ 1, or a fraction of them above 0")


def run(args: list[str]) -> None:
    """Parse and run ``fit``, ``validate`` or ``test``."""
    end_with_parent()
    remember_threads()  # before a module of the user's is imported, which may set another number
    objectives()  # imports every file, so that class_path may be a bare class name
    # Tokenising is done once, before any worker process exists; the library would warn about forking all the same.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    defaults: dict[str, Any] = {
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "check_val_every_n_epoch": NEVER,
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
