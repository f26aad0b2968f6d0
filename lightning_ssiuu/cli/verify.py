"""``lightning-ssiuu verify``: whether a model is the one that a certificate is about, and what it says still holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_ssiuu.cli.parsing import positional, run_function
from lightning_ssiuu.cli.report import print_table
from lightning_ssiuu.datamodules.deletion import IdNames, read_key
from lightning_ssiuu.evaluation.runs import run_data
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.digest import weights_sha256
from lightning_ssiuu.reports.certificate.content import FILE, KEY, SCHEMA, keyed
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.reading import read_json, reading

_ANOTHER = 3  # exit status: not the model, or not what the certificate says
_TOLERANCE = 0.1  # percentage points


def verify(
    certificate: str,
    model: str | None = None,
    key: str | None = None,
    ids: str | None = None,
    id_key: str | None = None,
    repeat: bool = False,
    devices: Devices | None = None,
) -> bool:
    """Whether a model is the one of a certificate, and rows are among the forgotten ones; and the scores again.

    Args:
        certificate: A ``certificate.json``.
        model: A saved model, whose weights are compared bit for bit.
        key: The file with the certificate's secret key, for ``ids``.
        ids: File with ids, one a line: each is said to be among the forgotten rows or not.
        id_key: The key under which the run's data hashed its ids (``ids: hashed``); None: they were not hashed.
        repeat: Score the forget set again with the data of the model's run, and compare within a tenth of a point.
        devices: Where to run.

    Returns:
        Whether all that was asked agrees. As a command the exit status is 0 if so, and 3 if not.

    Raises:
        UserError: If a file is missing, or is no certificate.
    """
    content = read_json(Path(certificate), "certificate", allowed=f"a {FILE} of this version", check=_check)
    if model is None and ids is None:
        raise UserError("model", None, "a saved model to compare, or ids and key")
    if (key is None) != (ids is None):
        raise UserError("key" if key is None else "ids", None, "a file: key and ids go together")
    if repeat and model is None:
        raise UserError("model", None, "the saved model whose scores are to be repeated")
    agreed = True
    if model is not None:
        digest = weights_sha256(model)
        found = [name for name, known in content["weights_sha256"].items() if known == digest]
        agreed = "unlearned" in found
        said = f"is the {' and '.join(found)} model" if found else "is none of the models"
        print(f"{model} {said} of this certificate (weights, SHA-256 {digest})")
    if ids is not None and key is not None:
        agreed &= _among(content, Path(key), Path(ids), IdNames(None if id_key is None else read_key(id_key)))
    if repeat and model is not None:
        agreed &= _repeated(content, model, devices if devices is not None else Devices())
    return agreed


def _check(content: Any) -> None:
    if content["schema"] != SCHEMA:
        raise ValueError(f"a certificate of another version: {content['schema']}")
    content["weights_sha256"]["unlearned"], content["forget"]["ids_hmac"]


def _among(content: dict[str, Any], key: Path, ids: Path, called: IdNames) -> bool:
    with reading("key", str(key), f"the {KEY} that lay beside the certificate"):
        secret = key.read_bytes().strip()
    with reading("ids", str(ids), "a text file with one id a line"):
        names = [line.strip() for line in ids.read_text(encoding="utf-8").splitlines() if line.strip()]
    known = set(content["forget"]["ids_hmac"])
    rows = [[name, "forgotten" if keyed(secret, "id", called(name)) in known else "not among them"] for name in names]
    print_table([["id", ""], *rows], right=False)
    return all(row[1] == "forgotten" for row in rows)


def _repeated(content: dict[str, Any], model: str, devices: Devices) -> bool:
    data = run_data(model, None)
    data.setup("validate")
    wanted = content["scores"]["unlearned"]["forget"]
    score = "probability" if "probability" in wanted else next(iter(wanted))
    with devices.launched():
        found = evaluate(devices.load(model), data.tokenizer, [data.eval_dataloader("forget")], [score])["forget"][
            score
        ]
    print(f"forget {score.replace('_', ' ')}: {found:.2f} % now, {wanted[score]:.2f} % in the certificate")
    return abs(found - wanted[score]) <= _TOLERANCE


def run(args: list[str]) -> None:
    """Parse and run ``verify``."""
    if not run_function(verify, "verify", positional(args, "certificate")):
        raise SystemExit(_ANOTHER)
