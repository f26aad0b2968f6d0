"""One unlearning objective per file, found by looking, not by a list."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from lightning_ssiuu.objectives.base import UnlearningModule


def objectives() -> dict[str, type[UnlearningModule]]:
    """Every objective of this package by class name: in each file the class that the file is named after."""
    found: dict[str, type[UnlearningModule]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for name, value in inspect.getmembers(module, inspect.isclass):
            if issubclass(value, UnlearningModule) and name.lower() == info.name.replace("_", ""):
                found[name] = value
    return dict(sorted(found.items()))


__all__ = ["UnlearningModule", "objectives"]
