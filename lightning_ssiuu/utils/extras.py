"""Packages that single features need: where one is missing, the error names the extra that brings it."""

from __future__ import annotations

import importlib.util

from lightning_ssiuu.utils.errors import UserError

#: By import name, the extra of setup.cfg.
EXTRAS = {
    "bitsandbytes": "quantization",
    "gguf": "gguf",
    "lm_eval": "lm-eval",
    "mlflow": "mlflow",
    "optuna": "search",
    "peft": "lora",
    "tensorboard": "tensorboard",
    "vllm": "vllm",
    "wandb": "wandb",
}


def installing(package: str) -> str:
    """The command that installs one of these packages.

    Example:
        >>> installing("peft")
        'pip install "lightning-ssiuu[lora]"'
    """
    return f'pip install "lightning-ssiuu[{EXTRAS[package]}]"'


def check_extra(package: str, argument: str, given: object, instead: str) -> None:
    """Refuse what needs a package that is not installed, without importing it.

    Args:
        package: Its import name, one of :data:`EXTRAS`.
        argument: What the user gave that needs it.
        given: The value of that.
        instead: What can be given without the package.

    Raises:
        UserError: If it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(argument, given, f"{instead} without {package}: {installing(package)}")
