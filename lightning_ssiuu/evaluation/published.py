"""Models that others published, by their names: what open-unlearning calls them (arXiv 2506.12618).

``open-unlearning/unlearn_tofu_MODEL_SPLIT_METHOD_SETTINGS`` was unlearned from ``open-unlearning/tofu_MODEL_full``, and
``open-unlearning/tofu_MODEL_RETAIN`` never saw the split. Nothing here looks for a model: names go in and come out.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from lightning_ssiuu.datamodules.tofu import RETAIN, Split
from lightning_ssiuu.utils.errors import UserError

OWNER = "open-unlearning"
#: The day in the prompts that open-unlearning trains with, and the system turn before a question.
DATE, SYSTEM = "2025-04-10", "You are a helpful assistant."
#: What stands around question and answer where a model is not asked through its chat template.
_TEMPLATES = {
    "Llama-2": "[INST] {question} [/INST]{answer}",
    "phi-1_5": "Question: {question}\nAnswer: {answer}",
}
_NAME = re.compile(rf"(?:unlearn_)?tofu_(?P<model>.+?)_(?P<split>{'|'.join(RETAIN)})_(?P<method>[^_]+)(?P<rest>.*)")
_SETTING = re.compile(r"([A-Za-z]+)(\d\S*)")


@dataclass(frozen=True)
class PublishedModel:
    """What an unlearned model's name says of it: ``method`` with its ``settings``, unlearned ``split`` from ``model``.

    Example:
        >>> found = published("open-unlearning/unlearn_tofu_Llama-3.2-1B-Instruct_forget10_NPO_lr1e-05_beta0.1_epoch10")
        >>> found.original, found.oracle
        ('open-unlearning/tofu_Llama-3.2-1B-Instruct_full', 'open-unlearning/tofu_Llama-3.2-1B-Instruct_retain90')
        >>> found.method, found.settings
        ('NPO', {'lr': '1e-05', 'beta': '0.1', 'epoch': '10'})
    """

    checkpoint: str
    model: str
    split: Split
    method: str
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its own name, without owner, folder and revision."""
        return _name(self.checkpoint)

    @property
    def retain(self) -> str:
        """TOFU's split without the forget set."""
        return RETAIN[self.split]

    @property
    def original(self) -> str:
        """The model before unlearning."""
        return self._beside(f"tofu_{self.model}_full")

    @property
    def oracle(self) -> str:
        """The model that never saw the forget set."""
        return self._beside(f"tofu_{self.model}_{self.retain}")

    @property
    def template(self) -> dict[str, Any]:
        """Options of the data module: how open-unlearning asks this model."""
        for model, text in _TEMPLATES.items():
            if self.model.startswith(model):
                return {"template": text}
        return {"template": "chat", "system_prompt": SYSTEM, "date": DATE}

    def content(self, suite: str) -> dict[str, Any]:
        """The ``suite`` block of ``audit.json``: names and settings, no path."""
        names = {"unlearned": self.name, "original": _name(self.original), "oracle": _name(self.oracle)}
        told = {"name": suite, "split": self.split, "model": self.model, "method": self.method}
        return told | {"settings": self.settings, "names": names}

    def _beside(self, name: str) -> str:
        # Of a directory the one beside it, where there is one; else the owner's on the hub.
        beside = Path(self.checkpoint).expanduser().parent / name
        return str(beside) if Path(self.checkpoint).expanduser().is_dir() and beside.is_dir() else f"{OWNER}/{name}"


def published(checkpoint: str | os.PathLike[str]) -> PublishedModel:
    """What a checkpoint's name says: a hub id, also ``ID@REVISION``, or a directory that is called so.

    Raises:
        UserError: If the name says nothing.
    """
    text = os.fspath(checkpoint)
    found = _NAME.fullmatch(_name(text))
    if found is None:
        called = f"unlearn_tofu_MODEL_SPLIT_METHOD_SETTINGS with SPLIT one of {', '.join(RETAIN)}"
        raise UserError("unlearned", text, f"a model called {called}; of others give --original, --oracle and --data")
    settings: dict[str, str] = {}
    for part in filter(None, found["rest"].split("_")):
        known = _SETTING.fullmatch(part)
        settings |= {known[1]: known[2]} if known else {part: ""}
    return PublishedModel(text, found["model"], cast(Split, found["split"]), found["method"], settings)


def _name(checkpoint: str) -> str:
    return Path(checkpoint).name.partition("@")[0]
