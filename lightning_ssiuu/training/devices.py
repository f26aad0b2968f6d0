"""Where ``attack`` and ``audit`` run: which devices, how many processes, in what precision."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric import Fabric
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import Architecture, find_architecture
from lightning_ssiuu.models.loading import load_model
from lightning_ssiuu.models.vllm_engine import VLLM, check_installed
from lightning_ssiuu.training.fsdp import load_sharded
from lightning_ssiuu.utils.console import quiet
from lightning_ssiuu.utils.errors import UserError, check_choice
from lightning_ssiuu.utils.messages import trainer_mistakes
from lightning_ssiuu.utils.processes import EndTogether
from lightning_ssiuu.utils.termination import keep_sigterm
from lightning_ssiuu.utils.threads import choose_threads
from lightning_ssiuu.utils.waiting import release

Strategy = Literal["auto", "ddp", "fsdp2"]
Precision = Literal["32-true", "bf16-mixed", "bf16-true"]
Engine = Literal["transformers", "vllm"]


class Devices:
    """The devices a command was given. Nothing is started before :meth:`launched`.

    Args:
        accelerator: As in Lightning's Trainer: ``auto``, ``cpu`` or ``gpu``.
        devices: How many, one process each; ``"auto"``: all GPUs, or one process on the CPU.
        strategy: ``"ddp"``: the whole model on every device; ``"fsdp2"``: its weights cut over them; ``"auto"``:
            ``"ddp"`` where there are several devices.
        precision: ``"32-true"``; ``"bf16-mixed"``: weights in float32, training steps in bfloat16; ``"bf16-true"``:
            weights in bfloat16 too.
        architecture: Where the models' blocks and neurons are, as for ``fit``; None: as in the judged model's run,
            else by their types.
        engine: What generates texts: ``"transformers"``; ``"vllm"`` (the extra ``[vllm]``): vLLM, of models as they are
            saved and on one device, beside which the model is loaded for all other scores.

    Raises:
        UserError: If an accelerator or a device is not there, or vLLM is missing or given several devices.
    """

    def __init__(
        self,
        accelerator: str = "auto",
        devices: int | Literal["auto"] = 1,
        strategy: Strategy = "auto",
        precision: Precision = "32-true",
        architecture: str | dict[str, Any] | Architecture | None = None,
        engine: Engine = "transformers",
    ) -> None:
        check_choice("engine", engine, Engine)
        self.accelerator, self.devices, self.precision = accelerator, devices, precision
        self.architecture = find_architecture(architecture)
        self.sharded = strategy == "fsdp2"
        # Sharding needs no more of the launcher than processes that know each other.
        launching = "ddp" if self.sharded else strategy
        given = {"accelerator": accelerator, "devices": devices, "strategy": strategy, "precision": precision}
        with quiet_lightning(), trainer_mistakes(given, prefix=""):
            try:
                self._fabric = Fabric(accelerator=accelerator, devices=devices, strategy=launching, precision=precision)
            except (RuntimeError, ModuleNotFoundError) as error:  # some of them do not say what they are about
                text = " ".join(str(error).split())
                raise UserError("accelerator", accelerator, f"what this machine has ({text})") from error
        self.engine = engine
        if engine == "vllm":
            check_installed()
            if self.sharded or self.n_ranks > 1:
                allowed = "transformers on several devices or with strategy fsdp2: vllm runs on one"
                raise UserError("engine", engine, allowed)
        self.tokens_of_a_pass: Callable[[], int] | None = None  # asked before the first model computes anything
        self.dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32

    @property
    def n_ranks(self) -> int:
        return self._fabric.world_size

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self._fabric.is_global_zero

    @property
    def device(self) -> torch.device:
        return self._fabric.device

    @contextmanager
    def launched(self) -> Iterator[None]:
        """Start the other processes, which run the same command again from its beginning, and meet them here.

        Check what the user may have got wrong before, so that it is reported once; inside, only the first process
        writes. Trainers made inside find the processes and start none. What ends one process ends all.
        """
        watch = EndTogether()
        with watch.ending():
            with quiet_lightning():
                self._fabric.launch()
            watch.take_over(self._fabric.strategy.launcher)
            release()
            if not self.is_first:
                from transformers.utils import logging as transformers_logging

                # All processes do the same; the first one's bars and warnings are enough.
                transformers_logging.disable_progress_bar()
                warnings.simplefilter("ignore")
            yield

    def trainer(self, epochs: int, callbacks: list[L.Callback]) -> L.Trainer:
        """The bare Trainer of an attack."""
        strategy: Any = "auto"
        if self.sharded:
            strategy = ModelParallelStrategy(data_parallel_size=self.n_ranks, tensor_parallel_size=1)
        elif self.n_ranks > 1:
            strategy = DDPStrategy(gradient_as_bucket_view=True)  # else every gradient is held twice
        trainer = L.Trainer(
            accelerator=self.accelerator,
            devices=self.devices,
            strategy=strategy,
            precision=self.precision,
            max_epochs=epochs,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            use_distributed_sampler=False,
        )
        keep_sigterm(trainer)
        return trainer

    def load(self, checkpoint: str, unchanged: bool = False) -> AnswerModel:
        """Load a model to this process's device; under ``"fsdp2"`` no process ever holds all of it but the first.

        ``unchanged``: its weights stay as they are saved, so that its texts may come from another engine.
        """

        def build(**options: Any) -> AnswerModel:
            return AnswerModel(load_model(checkpoint, self.dtype, architecture=self.architecture, **options))

        if not self.sharded:
            model = build().to(self.device)
            if unchanged and self.engine == "vllm":
                model.engine = VLLM(checkpoint, self.dtype, self.device)
            if self.device.type == "cpu" and self.tokens_of_a_pass is not None:
                parameters = sum(parameter.numel() for parameter in model.parameters())
                told = choose_threads(parameters, self.tokens_of_a_pass(), self.n_ranks)
                self.tokens_of_a_pass = None  # the same for all models of a command
                if told is not None and self.is_first:
                    tqdm.write(f"lightning-ssiuu: {told}", file=sys.stderr)  # above a bar, if there is one
            return model
        names = ("data_parallel", "tensor_parallel")
        mesh = init_device_mesh(self.device.type, (self.n_ranks, 1), mesh_dim_names=names)
        return load_sharded(build, mesh, self.device)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's banners and tips, which would drown the progress bar of a sweep's many Trainers."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            with quiet():
                yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
