"""Loggers of W&B's and MLflow's kind without their packages: they keep what they are given."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

#: All that were made, in order.
MADE: list[Any] = []


class Keeping(Logger):
    """The part that both have."""

    def keep(self) -> None:
        Logger.__init__(self)
        self.metrics: list[tuple[int | None, dict[str, float]]] = []
        self.hyperparameters: dict[str, Any] = {}
        self._checkpoint_callback = self._experiment = None
        self._save_dir, self._tracking_uri = ".", "file:mlruns"
        MADE.append(self)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append((step, dict(metrics)))

    def log_hyperparams(self, params: dict[str, Any]) -> None:  # type: ignore[override]
        self.hyperparameters |= params


class Wandb(Keeping, WandbLogger):
    """Its run is a record; images are taken as the real one's signature has them."""

    def __init__(self, id: str = "abc", project: str | None = None) -> None:
        self.keep()
        self._id, self.project = id, project
        self.images: list[tuple[str, Any, int]] = []
        self.run = SimpleNamespace(summary={}, finished=False)
        self.run.finish = lambda: setattr(self.run, "finished", True)

    @property
    def experiment(self) -> Any:
        return self.run

    def log_image(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(WandbLogger.log_image).bind(self, *args, **kwargs).arguments
        self.images.append((given["key"], *given["images"], given["step"]))


class MLflow(Keeping, MLFlowLogger):
    """Its client keeps figures and tags."""

    def __init__(self, run_id: str = "r1", experiment_name: str | None = None) -> None:
        self.keep()
        self._run_id, self._initialized = run_id, False
        self.figures: list[tuple[str, Any, str]] = []
        self.tags: dict[str, Any] = {}

    @property
    def experiment(self) -> Any:
        return self

    def log_figure(self, run_id: str, figure: Any, artifact_file: str) -> None:
        self.figures.append((run_id, figure, artifact_file))

    def set_tag(self, run_id: str, key: str, value: Any) -> None:
        self.tags[run_id, key] = value


class Unreachable(Wandb):
    """Its server has gone."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        raise ConnectionError("no route to host")
