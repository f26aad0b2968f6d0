"""Runs that were interrupted: what to go on from, and what a new run would lose."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import Strategy

from lightning_ssiuu.callbacks.save_pretrained import ADAPTER_END
from lightning_ssiuu.cli.settings import KEY, check_settings
from lightning_ssiuu.objectives import UnlearningModule
from lightning_ssiuu.training.checkpoints import check_checkpoint, check_states, newest_checkpoint
from lightning_ssiuu.training.progress import settle_progress
from lightning_ssiuu.utils.errors import UserError, one_line
from lightning_ssiuu.utils.files import refuse_existing
from lightning_ssiuu.utils.reading import read_yaml

_FINISHED = "metrics.json"  # what a run writes last
#: What ``fit`` writes beside the model; any of them in the way is a run that must not be overwritten unasked.
RESULTS = (_FINISHED, "config.yaml", "spurious_neurons.csv", "plots")
_HPC = re.compile(r"hpc_ckpt_(\d+)\.ckpt")  # what Lightning writes before a cluster's scheduler requeues a job
_MISFIT = re.compile(
    r"loading state_dict|loaded state dict|contains only the model|restored a checkpoint with"
    r"|Missing key in checkpoint|Size mismatch between saved"
)


def checkpoint_to_go_on_from(
    config: Any,
    trainer: L.Trainer,
    trained: UnlearningModule | None = None,
    settings: Callable[[], Mapping[str, Any]] = dict,
) -> Any:
    """The checkpoint that ``--ckpt_path`` means, checked; None to begin anew.

    ``last`` is the newest that :class:`~lightning_ssiuu.callbacks.KeepCheckpoints` left in the run's directory. Where
    there is none the run begins, so that one command can be given again and again until it has finished. ``trained`` is
    what ``fit`` is to go on with, ``settings()`` what determines that run (:func:`~.settings.run_settings`).
    """
    path = config.get("ckpt_path")
    if path == "last":
        newest = newest_checkpoint(Path(trainer.default_root_dir) / config.checkpoints.folder)
        has_own = any(isinstance(callback, ModelCheckpoint) for callback in trainer.checkpoint_callbacks)
        path = str(newest) if newest else "last" if has_own else None
    elif path == "best":
        raise UserError("ckpt_path", path, "last, or a path: which checkpoint is best is known within a run alone")
    elif path == "hpc":
        found = {
            int(match[1]): file
            for file in Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt")
            if (match := _HPC.fullmatch(file.name))
        }
        if not found:
            raise UserError(
                "ckpt_path", path, f"last, or a path: there is no hpc_ckpt_<n>.ckpt in {trainer.default_root_dir}"
            )
        path = str(found[max(found)])
    if path is None or path == "last":
        return path
    content = check_checkpoint("ckpt_path", path, config.get("weights_only") is not False)
    if Path(path).is_dir() and type(trainer.strategy).save_checkpoint is Strategy.save_checkpoint:
        raise UserError("ckpt_path", path, "a file: only strategies that shard the weights read folders of shards")
    if trained is not None and content:
        _check_same_run(content, settings(), path, trainer.is_global_zero)
        check_states(content, trained.stateful(), path)
        settle_progress(content)
        # Lightning would do nothing at all, not even write results, and end as if all were well.
        epochs = content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        for name, reached in (("max_steps", content["global_step"]), ("max_epochs", epochs)):
            if 0 < (getattr(trainer, name) or 0) <= reached:
                allowed = f"one from before the end of the run: it has {reached} of trainer.{name} behind it"
                raise UserError("ckpt_path", path, allowed)
    return path


def _check_same_run(content: Mapping[str, Any], settings: Mapping[str, Any], path: str, is_first_rank: bool) -> None:
    if KEY in content:
        check_settings(content[KEY], settings, path)
        return
    # Of an earlier version; beside the folder of a run's checkpoints lies what it was given.
    written = Path(path).absolute().parent.parent / "config.yaml"
    if written.is_file():
        check_settings(read_yaml(written, "ckpt_path"), settings, path)
    elif is_first_rank:
        note = f"{path} does not hold the settings its run began with: whether they are the same is not checked"
        print(f"lightning-ssiuu: note: {one_line(note)}", file=sys.stderr)


@contextmanager
def checkpoint_mistakes(path: Any) -> Iterator[None]:
    """Inside, a checkpoint that does not fit the model or the optimiser is a UserError."""
    try:
        yield
    except BaseException as error:  # torch.distributed.checkpoint's is no Exception
        text = " ".join(str(error).split())
        if path is None or isinstance(error, UserError) or not _MISFIT.search(text):
            raise
        raise UserError("ckpt_path", path, f"a checkpoint of this model, optimiser and run: {text[:200]}") from error


def refuse_to_lose(config: Any, root: str | Path, ckpt_path: Any, text: Callable[[], str]) -> None:
    """Refuse to begin a run where that would replace another one's results, or progress that could be taken up.

    What an interrupted run left may be replaced by the same run: by one with the same configuration, word for word
    (``text()`` is what it would write to ``config.yaml``), where there is no checkpoint to go on from.
    """
    argument, folder = "trainer.default_root_dir", Path(root)
    saved = config.saving.folder or "model"
    alone = config.saving.get("adapter") or not config.saving.get("merged", True)
    names = [saved, *([f"{saved}{ADAPTER_END}"] if alone else []), *RESULTS]
    if config.overwrite or (ckpt_path is not None and not (folder / _FINISHED).exists()):
        return
    if not (folder / _FINISHED).exists():
        if newest := newest_checkpoint(folder / config.checkpoints.folder):
            allowed = f"a directory without {newest.relative_to(folder)}, --ckpt_path last to go on, or --overwrite"
            raise UserError(argument, str(root), allowed)
        written = folder / "config.yaml"
        if written.is_file() and written.read_text(encoding="utf-8") == text():
            return
        if lost := next((name for name in names if (folder / name).exists()), None):
            allowed = f"a directory without {lost}, --ckpt_path to go on with the run interrupted there, or --overwrite"
            raise UserError(argument, str(root), allowed)
    refuse_existing(argument, root, names, overwrite=False)


def config_text(parser: LightningArgumentParser, config: Namespace) -> str:
    """The resolved configuration of a run, the same however often it was interrupted or begun anew."""
    config = config.clone()
    config["ckpt_path"], config["overwrite"] = None, False
    config.pop("estimate_memory", None)
    loggers = config.get("trainer.logger")
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        options = logger.get("init_args") if isinstance(logger, Namespace) else None
        if options and options.get("tracking_uri", "") == os.environ.get("MLFLOW_TRACKING_URI"):
            del options["tracking_uri"]  # MLFlowLogger's default, which may hold a password
    return parser.dump(config, skip_none=False, skip_validation=True)  # parsed, so checked
