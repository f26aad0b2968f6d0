"""``lightning-ssiuu certify``: the certificate of a run that was audited."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_ssiuu.cli.parsing import positional, run_function
from lightning_ssiuu.evaluation.results import read_config
from lightning_ssiuu.evaluation.runs import run_data
from lightning_ssiuu.models.digest import weights_sha256
from lightning_ssiuu.reports.certificate.content import FILE, KEY, certificate, key_of
from lightning_ssiuu.reports.certificate.page import certificate_html
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.files import refuse_existing, write_json, written_atomically
from lightning_ssiuu.utils.locks import only_here

HTML = "certificate.html"


def certify(
    run: str, original: str | None = None, oracle: str | None = None, show_ids: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Write the certificate of an audited run: ``certificate.json``, ``certificate.html`` (to print), a secret key.

    Nothing is measured: scores, attacks and verdict are those of the run. The ids of the forgotten rows, and the files
    that the forget set was read from, are in it as keyed hashes (HMAC-SHA256), so that nobody can find out by trying
    whether a row is among them. The key is in ``certificate.key``: keep it, and do not hand it out with the
    certificate.

    Args:
        run: A directory in which ``fit`` and ``audit`` (or ``erase``) have finished.
        original: The model before unlearning; None: the one that the run began from.
        oracle: The oracle of attack and audit.
        show_ids: Also write the ids as they are.
        overwrite: Replace an earlier certificate; its key stays.

    Returns:
        The contents of ``certificate.json``.

    Raises:
        UserError: If something of the run is missing.
    """
    folder = Path(run)
    model = str(folder / "model")
    if not (folder / "model").is_dir():
        raise UserError("run", run, "a directory of fit or erase with a model in it")
    config = read_config(folder, "run")
    with only_here("run", folder):
        refuse_existing("run", folder, [FILE, HTML], overwrite)
        data = run_data(model, None, "run")
        models = {"original": original or str(config["model"]["init_args"]["checkpoint"]), "unlearned": model}
        if oracle is not None:
            models["oracle"] = oracle
        weights = {name: weights_sha256(checkpoint, name) for name, checkpoint in models.items()}
        names = [example.source_id or example.name for example in data.splits.forget]  # of chunks: the documents'
        content = certificate(
            folder, weights, names, len(data.splits.retain), _sources(config), key_of(folder), show_ids
        )
        with written_atomically(folder / HTML) as temporary:
            temporary.write_text(certificate_html(content), encoding="utf-8")
        write_json(folder / FILE, content)
    print(f"{content['verdict']['sentence']}\nWritten to {run}: {FILE}, {HTML} (prints on A4), {KEY} (keep it secret)")
    return content


def _sources(config: dict[str, Any]) -> Sequence[Path]:
    # Local files that the forget set was read from; hub data sets have a revision.
    options = (config.get("data") or {}).get("init_args") or {}
    given = [options.get(name) for name in ("forget", "data", "forget_ids")]
    return [path for source in given if isinstance(source, str) and (path := Path(source).expanduser()).is_file()]


def run(args: list[str]) -> None:
    """Parse and run ``certify``."""
    run_function(certify, "certify", positional(args, "run"))
