"""How every command on saved models begins and ends: all refusals before anything is loaded, results in one place."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.evaluation.runs import (
    check_tokenizers,
    output_directory,
    resolve_models,
    run_architecture,
    run_data,
)
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.console import hide_short_bars
from lightning_ssiuu.utils.errors import naming
from lightning_ssiuu.utils.files import check_space, refuse_existing, write_json
from lightning_ssiuu.utils.provenance import provenance


class Report:
    """What a command is about and where its results go; checked, nothing loaded or written.

    Args:
        models: Checkpoint by the name of the argument it was given for; None is left out.
        data: The data module given; None: that of the run, see :func:`~lightning_ssiuu.evaluation.runs.run_data`.
        devices: Where the command runs.
        output: The directory given; None: the run of ``subject``.
        names: What the command writes and may not replace unasked.
        overwrite: Whether it may.
        subject: The argument of the model that is judged.
        needed: Bytes of disk space.

    Raises:
        UserError: A missing model or one with another tokenizer, nowhere to write, or results in the way.

    Example:
        >>> report = Report({"model": "tiny", "oracle": None}, None, Devices("cpu"), "runs/tiny")
        >>> report.models, report.folder.name, type(report.data).__name__
        ({'model': 'tiny'}, 'tiny', 'Facts')
    """

    def __init__(
        self,
        models: Mapping[str, str | None],
        data: UnlearningDataModule | None,
        devices: Devices,
        output: str | None,
        names: Sequence[str] = (),
        overwrite: bool = False,
        subject: str = "model",
        needed: int = 1 << 20,
    ) -> None:
        self._start = time.monotonic()
        self.models = {name: checkpoint for name, checkpoint in models.items() if checkpoint is not None}
        self.devices = devices
        hide_short_bars(*resolve_models(self.models))
        judged = self.models[subject]
        devices.architecture = run_architecture(judged, devices.architecture)
        self.folder = output_directory(judged, output)
        refuse_existing("output", self.folder, names, overwrite)
        check_space("output", self.folder, needed)
        self.data = run_data(judged, data)
        with naming(subject):
            check_tokenizers(self.models, self.data)

    @cached_property
    def data_sha256(self) -> str:
        """Of the data module."""
        return self.data.content_sha256()

    def provenance(self, options: Any) -> dict[str, Any]:
        """The ``provenance`` block.

        Args:
            options: What determined the results, as JSON can write it.
        """
        seconds = time.monotonic() - self._start
        return provenance(seconds, self.devices.device, json.dumps(options), self.data_sha256)

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write results into a file, whole or not at all."""
        write_json(self.folder / name, content)
