"""``lightning-ssiuu publish``: the model of a finished run on the Hugging Face hub, with a model card."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from lightning_ssiuu.callbacks.save_pretrained import ADAPTER_END
from lightning_ssiuu.cli.parsing import positional, run_function
from lightning_ssiuu.evaluation.results import read_sections
from lightning_ssiuu.models.adapter_directory import is_adapter_directory
from lightning_ssiuu.publishing.publication import (
    Publication,
    Subject,
    check_hub,
    check_output,
    check_repository,
    publication,
    push,
    write,
)
from lightning_ssiuu.utils.errors import UserError, one_line
from lightning_ssiuu.utils.files import print_written

_LICENSE = re.compile(r"[a-z\d][a-z\d.+-]*")


def publish(
    run: str,
    to: str | None = None,
    output: str | None = None,
    private: bool = True,
    adapter: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
) -> Publication:
    """Push a run's model to the hub, with a card of scores, attacks and verdict; or write that to a directory.

    What leaves is the model's own files, ``README.md`` and ``certificate.json``, where there is one. Of attacks, audit
    and certificate only what is of these weights and data counts. No text or id of the data, no digest that such could
    be guessed by, and no path of this machine is among it.

    Args:
        run: A directory in which ``fit`` or ``erase`` has finished.
        to: The repository on the hub, ``owner/name``. It is made where there is none.
        output: A directory for exactly what would be pushed; nothing is pushed then, and no hub is asked.
        private: Whether nobody else may see the repository.
        adapter: The adapters alone instead of the merged model.
        base_model: Hub id of the model before unlearning. Without it the card names a model that was loaded from the
            hub, and none that was loaded from a directory.
        license: Identifier of the model's licence, as the hub has them (``apache-2.0``).
        overwrite: Replace what was published before.

    Returns:
        The files, and what was left out with the reason.

    Raises:
        UserError: If there is no such model, a name is none, the directory holds something else, or the hub cannot be
            reached or refuses.

    Example:
        >>> publish("runs/ssiuu")
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: to: got None, allowed: owner/name, a repository on the hub, or an --output directory
    """
    if to is None and output is None:
        raise UserError("to", None, "owner/name, a repository on the hub, or an --output directory")
    if license is not None and not _LICENSE.fullmatch(license):
        raise UserError("license", license, "an identifier as the hub has them, such as apache-2.0, or other")
    folder = Path(run)
    model = _model(folder, adapter)
    held: list[str] = []
    if output is not None:
        if to is not None:
            check_repository("to", to)
        check_output("output", Path(output), model, overwrite)
    elif to is not None:
        held = check_hub("to", to, private, overwrite)
    content = publication(folder, model, Subject(to, license=license), base_model)
    if output is not None:
        write("output", Path(output), content)
    elif to is not None:
        push("to", to, content, private, held)
        print(f"Pushed to {to}: {', '.join(content.files)}")
    for reason in content.left_out:
        print(f"lightning-ssiuu: note: left out: {one_line(reason)}", file=sys.stderr)
    if output is not None:
        print_written(output, content.files)
    return content


def _model(run: Path, adapter: bool) -> Path:
    saved = read_sections(run, "run")["saving"].get("folder") if (run / "config.yaml").is_file() else None
    name = saved if isinstance(saved, str) else "model"
    model = run / (f"{name}{ADAPTER_END}" if adapter else name)
    if not model.is_dir():
        other = run / (name if adapter else f"{name}{ADAPTER_END}")
        hint = f" (there is {other.name}, with{'out' if adapter else ''} --adapter)" if other.is_dir() else ""
        if (run / "config.json").is_file() or is_adapter_directory(run):
            hint = f", as {run.parent} may be: this is a model"
        raise UserError("run", str(run), f"a directory of fit or erase with {model.name} in it{hint}")
    return model


def run(args: list[str]) -> None:
    """Parse and run ``publish``."""
    run_function(publish, "publish", positional(args, "run"))
