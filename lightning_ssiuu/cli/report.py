"""How every command on saved models begins and ends: all refusals before anything is loaded, results in one place."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any

from rich.table import Table
from rich.text import Text

from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.evaluation.loaders import tokens_of_a_pass
from lightning_ssiuu.evaluation.runs import (
    asked_otherwise,
    check_tokenizers,
    output_directory,
    resolve_models,
    run_architecture,
    run_data,
)
from lightning_ssiuu.models.digest import weights_sha256
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.console import hide_short_bars
from lightning_ssiuu.utils.errors import naming
from lightning_ssiuu.utils.files import check_space, refuse_existing, write_json
from lightning_ssiuu.utils.locks import only_here
from lightning_ssiuu.utils.provenance import provenance
from lightning_ssiuu.utils.terminal import text_console
from lightning_ssiuu.utils.version import commit


class Report:
    """The models, data and output directory of a command; checked, nothing loaded or written.

    A context: until it ends no other command can work in the output directory.

    ``models`` are checkpoints by argument (None is left out), ``subject`` is the argument of the one that is judged:
    its run is the default for ``data`` and ``output``. The files ``names`` are refused unless ``overwrite``; ``needed``
    is disk space in bytes.
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
        commit()  # of the code that was loaded; another one may be checked out by the end
        self.models = {name: checkpoint for name, checkpoint in models.items() if checkpoint is not None}
        self.devices, self._given = devices, data is not None
        hide_short_bars(*resolve_models(self.models))
        judged = self.models[subject]
        devices.architecture = run_architecture(judged, devices.architecture, subject)
        self.folder = output_directory(judged, output)
        with ExitStack() as held:
            if devices.is_first:
                held.enter_context(only_here("output", self.folder))
            refuse_existing("output", self.folder, names, overwrite)
            check_space("output", self.folder, needed)
            self.data = run_data(judged, data, subject)
            #: How the data are asked otherwise than the run's; nothing where they are the run's.
            self.data_options = {} if data is None else asked_otherwise(judged, self.data)
            with naming(subject):
                check_tokenizers(self.models, self.data)
            devices.tokens_of_a_pass = partial(tokens_of_a_pass, self.data)
            self._held = held.pop_all()

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @property
    def data_words(self) -> list[str]:
        """The option of the command line that names the data given, and how they are asked; none for the run's.

        Where the data lie is not said: conditions and ids may stand there.
        """
        if not self._given:
            return []
        kind = type(self.data)
        name = kind.__name__ if kind.__module__.startswith("lightning_ssiuu.") else f"{kind.__module__}.{kind.__name__}"
        section = {"class_path": name, "init_args": self.data_options}  # as JSON, for a template may have a colon
        return [f"--data {shlex.quote(json.dumps(section)) if self.data_options else name}"]

    @cached_property
    def data_sha256(self) -> str:
        return self.data.content_sha256()

    @cached_property
    def weights_sha256(self) -> dict[str, str]:
        """Digests of the models' weights, by argument."""
        return {name: weights_sha256(checkpoint, name) for name, checkpoint in self.models.items()}

    def provenance(self, options: Any) -> dict[str, Any]:
        """The ``provenance`` block; ``options`` are JSON values that determined the results.

        It has the digests of the models' weights, so that nothing is said of another model put in the place of one.
        """
        block = provenance(time.monotonic() - self._start, self.devices.device, json.dumps(options), self.data_sha256)
        return block | {"weights_sha256": self.weights_sha256}

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        write_json(self.folder / name, content)


def print_table(
    rows: Sequence[Sequence[str]], title: str | None = None, notes: Sequence[Any] = (), right: bool = True
) -> None:
    """Print rows, the first of them the header, columns after the first aligned right; title above, notes below."""
    console, table = text_console(), Table(box=None)
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if right and number else "left")
    for row in rows[1:]:
        table.add_row(*map(Text, row))  # brackets in names are no markup
    for part in (title, table, *notes):
        if part is not None:
            console.print(part, markup=False)
