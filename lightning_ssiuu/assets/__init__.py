"""The embedded tiny model and its data, which need no hub and no network."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from lightning_ssiuu.utils.errors import UserError

_NAMES = ("facts.json", "tiny", "world_facts.json")


def asset_path(name: str) -> Path:
    """Find an embedded asset on disk.

    Args:
        name: ``"tiny"`` (a transformers directory: model and tokenizer), ``"facts.json"`` (the fictitious people)
            or ``"world_facts.json"`` (the real facts).

    Returns:
        The path of the directory or the file.

    Raises:
        UserError: There is no asset of that name.

    Example:
        >>> asset_path("tiny").name
        'tiny'
        >>> asset_path("big")
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: name: got 'big', allowed: facts.json, tiny, world_facts.json
    """
    if name not in _NAMES:
        raise UserError("name", name, ", ".join(_NAMES))
    # setuptools installs packages unzipped, so the resource is a real path.
    return Path(str(files(__name__) / name))
