"""Hand a finished run's model on: one list of files, pushed to the Hugging Face hub or written to a directory.

Only what is listed leaves: the model's own files, the card and the certificate. No configuration, no table with ids, no
checkpoint, and no path of the machine that made them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from lightning_ssiuu.models.adapter_directory import CONFIG, is_adapter_directory
from lightning_ssiuu.publishing.findings import findings_of, is_place
from lightning_ssiuu.publishing.model_card import Base, Subject, base_of, model_card
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.files import check_space, file_sha256, written_atomically
from lightning_ssiuu.utils.reading import read_json, reading

CARD, CERTIFICATE = "README.md", "certificate.json"
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "adapter_model.safetensors")
#: Names of a model's own files; what else lies beside them stays.
_FILES = (
    *(*_WEIGHTS, "model.safetensors.index.json", "config.json", "generation_config.json", CONFIG),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json"),
)
#: What libraries write of how and from where they loaded something.
_PLACES = ("name_or_path", "_name_or_path", "tokenizer_file", "vocab_file", "is_local", "local_files_only")
_NAMING = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", CONFIG)


@dataclass(frozen=True)
class Publication:
    """What leaves: the files by their names, each a path to be copied or its bytes, and what stays, with the reason."""

    files: Mapping[str, Path | bytes]
    left_out: tuple[str, ...] = ()


def check_repository(argument: str, name: str) -> None:
    """Refuse what is no name of a repository on the hub.

    Raises:
        UserError: If it is not ``owner/name``.

    Example:
        >>> check_repository("to", "my model")
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: to: got 'my model', allowed: owner/name, of letters, digits, -, _ and .
    """
    try:
        validate_repo_id(name)
        if name.count("/") == 1:
            return
    except HFValidationError:
        pass
    raise UserError(argument, name, "owner/name, of letters, digits, -, _ and .")


def check_hub(argument: str, name: str, private: bool = True, overwrite: bool = False) -> list[str]:
    """Ask the hub whether something can be pushed there, before there is anything to push.

    Args:
        argument: What errors name.
        name: The repository, ``owner/name``.
        private: Whether nobody else may see it.
        overwrite: Whether it may hold a model already.

    Returns:
        The files it holds; none where there is no such repository yet.

    Raises:
        UserError: If the name is none, ``HF_HUB_OFFLINE`` is set, there is no token, the hub does not answer, the
            repository holds files, or is public and should not be.
    """
    check_repository(argument, name)
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError(argument, name, "null while HF_HUB_OFFLINE is set: no hub is asked")
    if not huggingface_hub.get_token():
        raise UserError(argument, name, "a repository of yours: log in with `hf auth login`, or set HF_TOKEN")
    with _hub(argument, name):
        api = huggingface_hub.HfApi()
        api.whoami()
        try:
            info = api.model_info(name)
        except RepositoryNotFoundError:
            return []
    held = [file.rfilename for file in info.siblings or () if file.rfilename != ".gitattributes"]
    if private and info.private is False:
        raise UserError(argument, name, "a private repository, or private false: this one is public")
    if held and not overwrite:
        allowed = f"a repository without files (there are {len(held)}), or lightning-ssiuu publish with --overwrite"
        raise UserError(argument, name, allowed)
    return held


def publication(
    run: Path, model: Path, subject: Subject, base_model: str | None = None, checkpoint: str | None = None
) -> Publication:
    """Everything that is to leave of a run, ready to be written or pushed; nothing is changed.

    Args:
        run: The run's directory.
        model: The directory of its model, or of adapters alone.
        subject: Name and licence; the rest is found.
        base_model: Hub id of the model before unlearning, perhaps with ``@REVISION``, where the run knows it by a path.
        checkpoint: The model before unlearning, where no ``config.yaml`` names it.

    Raises:
        UserError: If there is no such model, ``base_model`` is no hub id, or a record of the run cannot be read.
    """
    if base_model is not None:
        check_repository("base_model", base_model.partition("@")[0])
    findings = findings_of(run, model)
    options = (findings.config.get("model") or {}).get("init_args") or {}
    base = base_of(options.get("checkpoint", checkpoint), options.get("revision"))
    if base_model is not None:
        name, _, revision = base_model.partition("@")
        base = Base(name, revision or None)
    adapter = is_adapter_directory(model)
    files: dict[str, Path | bytes] = {}
    left_out = list(findings.left_out)
    for path in sorted(model.iterdir()):
        if not _is_listed(path.name) or not path.is_file():
            left_out.append(f"{model.name}/{path.name}: no file of a model")
        elif path.is_symlink():
            raise UserError("run", str(path), "a file itself: a symbolic link may lead to anything")
        elif path.name in _NAMING:
            files[path.name] = _without_places(path, base)
        else:
            files[path.name] = path
    hashes = {name: file_sha256(file) for name, file in files.items() if isinstance(file, Path) and _is_weights(name)}
    subject = replace(subject, base=base, adapter=adapter, hashes=hashes)
    files[CARD] = model_card(findings, subject).encode()
    if findings.certificate is not None:
        files[CERTIFICATE] = findings.certificate
    return Publication(files, tuple(left_out))


def push(argument: str, name: str, content: Publication, private: bool = True, held: list[str] | None = None) -> None:
    """Push to the hub in one commit, into a repository that is made where there is none.

    Args:
        argument: What errors name.
        name: The repository, ``owner/name``.
        content: What to push.
        private: Whether a new repository is private.
        held: The files there (:func:`check_hub`); those of an earlier model go, as other shards would be loaded.

    Raises:
        UserError: If the hub refuses.
    """
    add, delete = huggingface_hub.CommitOperationAdd, huggingface_hub.CommitOperationDelete
    operations: list[Any] = [add(path, file) for path, file in content.files.items()]
    ours = {path for path in held or () if _is_listed(path) or path == CERTIFICATE}
    operations += [delete(path) for path in sorted(ours - set(content.files))]
    with _hub(argument, name):
        api = huggingface_hub.HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        api.create_commit(name, operations, commit_message="Unlearned model, with its card")


def check_output(argument: str, output: Path, model: Path, overwrite: bool = False) -> None:
    """Refuse a directory that something would be lost in: only an earlier publication is replaced.

    Raises:
        UserError: If it holds anything else, or one and ``overwrite`` is not given, or it is in the model's.
    """
    place = output.absolute()
    if output.is_symlink() or model.resolve() in (place.resolve(), *place.resolve().parents):
        raise UserError(argument, str(output), f"a directory outside of {model}, and no symbolic link")
    if not output.exists():
        return
    with reading(argument, str(output), "a directory, or one that is not there"):
        names = [path.name for path in output.iterdir()]
    if others := sorted(name for name in names if not _is_listed(name) and name not in (CARD, CERTIFICATE)):
        raise UserError(argument, str(output), f"a directory of its own (there is {others[0]})")
    if names and not overwrite:
        raise UserError(argument, str(output), "a directory that is empty or not there, or --overwrite")


def write(argument: str, output: Path, content: Publication) -> None:
    """Write exactly what would be pushed into a directory, whole or not at all.

    Raises:
        UserError: If the disk has no room, or refuses.
    """
    sizes = [len(file) if isinstance(file, bytes) else file.stat().st_size for file in content.files.values()]
    check_space(argument, output, sum(sizes))
    with written_atomically(output) as temporary:
        temporary.mkdir()
        for name, file in content.files.items():
            if isinstance(file, bytes):
                (temporary / name).write_bytes(file)
            else:
                shutil.copyfile(file, temporary / name)


@contextmanager
def _hub(argument: str, name: str) -> Iterator[None]:
    with reading(argument, name, "a repository on a hub that answers, which you may write"):
        yield


def _is_listed(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _FILES)


def _is_weights(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _WEIGHTS)


def _cleared(content: Any) -> Any:
    if isinstance(content, Mapping):
        held = {name: value for name, value in content.items() if name not in _PLACES and not is_place(value)}
        return {name: _cleared(value) for name, value in held.items()}
    return list(map(_cleared, content)) if isinstance(content, list) else content


def _without_places(path: Path, base: Base) -> bytes:
    content = read_json(path, "run")
    kept = _cleared(content)
    if path.name == CONFIG:
        # save_adapter made a local directory's name absolute; a relative one would be taken for a hub id.
        kept |= {"base_model_name_or_path": base.name, "revision": base.revision}
    if kept == content:
        return path.read_bytes()
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()
