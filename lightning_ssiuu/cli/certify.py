"""``lightning-ssiuu certify``: the certificate of a run that was audited."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_ssiuu.cli.parsing import positional, run_function
from lightning_ssiuu.datamodules import CustomData, Documents, UnlearningDataModule
from lightning_ssiuu.evaluation.results import read_config
from lightning_ssiuu.evaluation.runs import run_data
from lightning_ssiuu.models.digest import weights_sha256
from lightning_ssiuu.reports.audit.evidence import recorded_relearning
from lightning_ssiuu.reports.certificate.content import FILE, KEY, certificate, key_of, records
from lightning_ssiuu.reports.certificate.page import certificate_html
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.files import refuse_existing, write_json, written_atomically
from lightning_ssiuu.utils.locks import only_here

HTML = "certificate.html"


def certify(run: str, show_ids: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Write the certificate of an audited run: ``certificate.json``, ``certificate.html`` (to print), a secret key.

    Nothing is measured: scores, attacks and verdict are those of the run, which must be of the model and the data that
    are there now. The ids of the forgotten rows, the files that the forget set was read from and the configuration are
    in it as keyed hashes (HMAC-SHA256), so that nobody can find out by trying whether a row is among them. The key is
    in ``certificate.key``: keep it, and do not hand it out with the certificate.

    Args:
        run: A directory in which ``fit`` and ``audit`` (or ``erase``) have finished.
        show_ids: Also write the ids as they are.
        overwrite: Replace an earlier certificate; its key stays.

    Returns:
        The contents of ``certificate.json``.

    Raises:
        UserError: If something of the run is missing, or an attack or the audit was made on another model, on other
            data, or before an attack that the verdict does not know.
    """
    folder = Path(run)
    model = str(folder / "model")
    if not (folder / "model").is_dir():
        raise UserError("run", run, "a directory of fit or erase with a model in it")
    config = read_config(folder, "run")
    with only_here("run", folder):
        refuse_existing("run", folder, [FILE, HTML], overwrite)
        data = run_data(model, None, "run")
        _check_evidence(folder, model, data)
        names = [example.source_id or example.name for example in data.splits.forget]  # of chunks: the documents'
        id_key = data.id_names.key if isinstance(data, CustomData | Documents) else None
        rows = (names, len(data.splits.retain), _sources(config))
        content = certificate(folder, *rows, key_of(folder), show_ids, id_key)
        with written_atomically(folder / HTML) as temporary:
            temporary.write_text(certificate_html(content), encoding="utf-8")
        write_json(folder / FILE, content)
    told = [content["verdict"]["sentence"], *content["not_counted"]]
    print("\n".join([*told, f"Written to {run}: {FILE}, {HTML} (prints on A4), {KEY} (keep it secret)"]))
    return content


def _check_evidence(folder: Path, model: str, data: UnlearningDataModule) -> None:
    # What is certified is what was attacked and audited: this model, these rows, all of these attacks.
    metrics, audit, attacks = records(folder)
    weights, rows = weights_sha256(model, "run"), data.content_sha256()
    made = {f"attack.json ({name})": settings for name, settings in attacks["settings"].items()}
    for name, content in {"metrics.json": metrics, **made, "audit.json": audit}.items():
        provenance = content.get("provenance") or {}
        if provenance.get("data_sha256") != rows:
            allowed = f"a directory whose {name} is of the data that its config.yaml names now"
            raise UserError("run", str(folder), allowed)
        digests = provenance.get("weights_sha256", {})
        if name != "metrics.json" and digests.get("unlearned", digests.get("model")) != weights:
            raise UserError("run", str(folder), f"a directory whose {name} is of the model that is there now")
    relearning = audit.get("relearning") or {}
    known = relearning.get("attacks") if relearning.get("source") == "attack.json" else None
    recorded = recorded_relearning(model, relearning.get("score"), "oracle" in audit["scores"]) or {}
    if recorded.get("attacks") != known:
        allowed = "a directory whose verdict is from the attacks in its attack.json: run audit again"
        raise UserError("run", str(folder), allowed)


def _sources(config: dict[str, Any]) -> Sequence[Path]:
    # Local files that the forget set was read from; hub data sets have a revision.
    options = (config.get("data") or {}).get("init_args") or {}
    given = [options.get(name) for name in ("forget", "data", "forget_ids")]
    places = [Path(source).expanduser() for source in given if isinstance(source, str)]
    files = [file for place in places for file in (place.rglob("*") if place.is_dir() else [place])]
    return [file for file in files if file.is_file()]


def run(args: list[str]) -> None:
    """Parse and run ``certify``."""
    run_function(certify, "certify", positional(args, "run"))
