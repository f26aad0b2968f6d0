"""``lightning-ssiuu verify``: whether a model is the one that a certificate is about, and what it says still holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_ssiuu.cli.parsing import bare, positional, run_function
from lightning_ssiuu.cli.repeating import SCORES, AttackAgain, scored_again
from lightning_ssiuu.cli.report import print_table
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.datamodules.deletion import IdNames, read_ids, read_key
from lightning_ssiuu.evaluation.runs import run_of
from lightning_ssiuu.models.digest import weights_sha256
from lightning_ssiuu.reports.certificate.content import FILE, SCHEMA, keyed, sealed
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.reading import only, read_json, reading

_ANOTHER = 3  # exit status: not the model, or not what the certificate says


def verify(
    certificate: str,
    model: str | None = None,
    key: str | None = None,
    ids: str | None = None,
    id_key: str | None = None,
    repeat: str | None = None,
    p: float | None = None,
    seed: int | None = None,
    data: UnlearningDataModule | None = None,
    devices: Devices | None = None,
) -> bool:
    """Whether a model is the one of a certificate, rows are among the forgotten ones, and a figure comes out again.

    Args:
        certificate: A ``certificate.json``.
        model: A saved model, whose weights are compared bit for bit.
        key: The file with the certificate's secret key: whether it is as it was made; and for ``ids``.
        ids: File with ids, one a line, or a table with a column of ids: each is said to be among the forgotten rows or
            not.
        id_key: The key under which the run's data hashed its ids (``ids: hashed``); None: they were not hashed.
        repeat: ``scores`` (also without a value): score the forget set again. Or an attack of the certificate, such as
            ``harmful``, which is made again on the model with the same options. A score agrees within a tenth of a
            point, an attack within its spread over seeds; on one CPU they are the same.
        p: Of a relearning attack, the fraction to repeat; None: all.
        seed: The seed to repeat, with the learning rate and the epochs that found most in it; None: all of the attack.
        data: The data module the model was unlearned with; by default its run's.
        devices: Where to run.

    Returns:
        Whether all that was asked agrees. As a command the exit status is 0 if so, and 3 if not.

    Raises:
        UserError: If a file is missing, or is no certificate; if there is no such attack in it; if ``id_key`` is not
            the one under which ids were hashed.
    """
    content = read_json(Path(certificate), "certificate", allowed=f"a {FILE} of this version", check=_check)
    if model is None and key is None:
        raise UserError("model", None, "a saved model to compare, or the certificate's key")
    if key is None and ids is not None:
        raise UserError("key", None, "the certificate's key, without which no id can be told")
    if repeat is not None and model is None:
        raise UserError("model", None, "the saved model whose figures are to be repeated")
    if repeat in (None, SCORES) and (p is not None or seed is not None):
        raise UserError("repeat", repeat, "an attack of the certificate, whose p and seed are given")
    secret = None if key is None else read_key(key, "key")
    listed = [] if ids is None else read_ids(ids, "ids")
    called = IdNames(None if id_key is None else read_key(id_key))
    again = None
    if repeat is not None and repeat != SCORES:
        with reading("certificate", certificate, "a certificate as it was made", quote=False):
            again = AttackAgain(content, repeat, p, seed)
    if repeat is not None and data is None and run_of(str(model)) is None:
        raise UserError("data", None, "the data the model was unlearned with: it does not lie in its run's directory")
    agreed = True
    if secret is not None:
        agreed = sealed(content, secret)["seal"] == content["seal"]
        said = "is as it was made" if agreed else "was edited, or this is another certificate's key"
        print(f"{certificate} {said}")
        if agreed and listed:
            known = content["forget"]["id_key_hmac"]
            if known != (None if called.key is None else keyed(secret, "id_key", called.key)):
                allowed = "nothing: the ids were not hashed" if known is None else "the key under which ids were hashed"
                raise UserError("id_key", id_key, allowed)
            agreed = _among(content, secret, listed, called)
    if model is not None:
        agreed &= _is_model(content, model)
    if repeat is not None and model is not None:
        devices = devices if devices is not None else Devices()
        scored = scored_again(content, model, data, devices) if again is None else again.on(model, data, devices)
        for figure in scored:
            print(figure)
            agreed &= figure.agrees
    return agreed


def _check(content: Any) -> None:
    if content["schema"] != SCHEMA:
        raise ValueError(f"a certificate of another version: {content['schema']}")
    only(dict, content["weights_sha256"], content["settings"])
    only(str, content["weights_sha256"]["unlearned"], content["seal"], *content["forget"]["ids_hmac"])
    only((int, float), *content["scores"]["unlearned"]["forget"].values())
    for each in (content.get("scored", {}), *content["settings"].values()):
        only((int, type(None)), each.get("data_options", {}).get("max_eval_examples"))
    for row in content["tried"]:
        only(str, row["attack"])
        for found in row["unlearned"].get("by_seed", ()):
            only((int, float), found["seed"], found["learning_rate"], found["epochs"])
        highest = row["unlearned"]["highest"]
        only((int, float), highest["mean"], highest["std"], *highest["per_seed"])


def _is_model(content: Mapping[str, Any], model: str) -> bool:
    digest = weights_sha256(model)
    found = [name for name, known in content["weights_sha256"].items() if known == digest]
    said = f"is the {' and '.join(found)} model" if found else "is none of the models"
    print(f"{model} {said} of this certificate (weights, SHA-256 {digest})")
    return "unlearned" in found


def _among(content: Mapping[str, Any], key: bytes, ids: list[str], called: IdNames) -> bool:
    known = set(content["forget"]["ids_hmac"])
    rows = [[name, "forgotten" if keyed(key, "id", called(name)) in known else "not among them"] for name in ids]
    print_table([["id", ""], *rows], right=False)
    return all(row[1] == "forgotten" for row in rows)


def run(args: list[str]) -> None:
    """Parse and run ``verify``."""
    if not run_function(verify, "verify", bare(positional(args, "certificate"), "repeat", SCORES)):
        raise SystemExit(_ANOTHER)
