"""What TensorBoard, Weights & Biases and MLflow take beside numbers: pictures and sentences. Others are passed over."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_ssiuu.utils.distributed import rank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Argument by which a logger goes on with a run that there is; its value is the logger's ``version``.
_IDENTITY = {TensorBoardLogger: "version", WandbLogger: "id", MLFlowLogger: "run_id"}


def log_image(loggers: Iterable[Logger], name: str, draw: Callable[[], Figure], step: int) -> None:
    """Give a picture to every logger that takes one, on the first rank; it is drawn only then.

    Whatever has an ``experiment`` with an ``add_image`` is one of TensorBoard's kind. MLflow has a file per step.
    """
    drawn = cache(draw)

    def image() -> np.ndarray:
        from lightning_ssiuu.utils.figures import pixels  # with it comes matplotlib

        return pixels(drawn())

    for logger in loggers if rank() == 0 else ():
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [image()], step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(logger.run_id, drawn(), f"{name}/step_{step:06d}.png")
        elif callable(add_image := getattr(getattr(logger, "experiment", None), "add_image", None)):
            add_image(name, image(), step, dataformats="HWC")


def log_text(loggers: Iterable[Logger], name: str, text: str, step: int) -> None:
    """Give a sentence to the loggers that keep one, on the first rank: a text, a summary, a tag."""
    for logger in loggers if rank() == 0 else ():
        if isinstance(logger, WandbLogger):
            logger.experiment.summary[name] = text
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.set_tag(logger.run_id, name, text)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, text, step)


def identities(loggers: Iterable[Logger]) -> list[Any]:
    """What :func:`reopened` needs to go on with the runs of these loggers, as JSON; None for those that cannot."""
    return [logger.version if isinstance(logger, tuple(_IDENTITY)) else None for logger in loggers]


def reopened(kind: Any, options: dict[str, Any], identity: Any) -> Logger | None:
    """The logger made anew that goes on where one of this class, with these options and this identity, was.

    None for a class that cannot: CSVLogger would begin its file anew.

    Raises:
        FileNotFoundError: TensorBoard's folder is not where it was, or the working directory is another one.
    """
    for known, argument in _IDENTITY.items():
        if isinstance(kind, type) and issubclass(kind, known) and identity is not None:
            made: Logger = kind(**options | {argument: identity})
            if isinstance(made, TensorBoardLogger) and not get_filesystem(made.log_dir).isdir(made.log_dir):
                raise FileNotFoundError(f"there is no {made.log_dir}, seen from the working directory")
            return made
    return None


def closed(logger: Logger) -> None:
    """Write what a logger has not written yet, and end its run."""
    logger.finalize("success")
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()
