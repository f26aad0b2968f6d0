"""What an objective or a regulariser was made with, as plain values that a checkpoint keeps and loggers show."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch.core.saving import load_hparams_from_yaml, save_hparams_to_yaml
from lightning.pytorch.loggers import TensorBoardLogger
from torch.optim.lr_scheduler import LRScheduler

from lightning_ssiuu.models.architectures import Architecture
from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.training.checkpoints import AtomicCheckpointIO
from lightning_ssiuu.utils.errors import UserError

#: Keys of a checkpoint: the arguments, where Lightning has them, too, and the class, by :func:`class_path`.
_ARGUMENTS, _CLASS = "hyper_parameters", "objective_class"
#: Key of what stands for a value that cannot be written down (a function, an object of a foreign class).
_NOT_SAVED = "not_saved"
#: Key of what loggers are told of the run beside the objective's arguments.
_RUN = "run"
_PACKAGE = __name__.partition(".")[0]
_FACTORIES = (torch.optim.Optimizer, LRScheduler)  # given as partials: what makes one
_RECORDS = (LoRA, Architecture)


class Described:
    """Remembers the arguments it was made with, whatever its subclasses hand on to each other.

    Example:
        >>> class Point(Described):
        ...     def __init__(self, x, y=0):
        ...         pass
        >>> plain(Point(1))["init_args"]
        {'y': 0, 'x': 1}
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if cls.__init__ is object.__init__ and (args or kwargs):  # which object no longer says where this is overridden
            raise TypeError(f"{cls.__name__}() takes no arguments")
        made = super().__new__(cls)
        made.__dict__["_given"] = args, kwargs
        return made


def hyperparameters(of: Described) -> dict[str, Any]:
    """What ``of`` was made with, by name, as plain values; defaults of its own where nothing was given.

    A function or a foreign object has no plain form: ``{"not_saved": <its type>}`` stands for it.
    """
    args, kwargs = of.__dict__["_given"]
    own = inspect.signature(type(of).__init__).parameters
    defaults = {name: parameter.default for name, parameter in own.items() if parameter.default is not parameter.empty}
    given = defaults | dict(zip(_positional(type(of)), args, strict=False)) | kwargs
    values = {name: plain(value) for name, value in given.items()}
    return {n: v for n, v in values.items() if n not in defaults or given[n] is not defaults[n] or not _missing(v)}


def for_loggers(module: Any, trainer: Any) -> dict[str, Any]:
    """Hyperparameters of a run, for its loggers: the objective's arguments, and under ``run`` what else shaped it.

    That is the objective's and the data module's class, the data module's numbers, the seed and the Trainer's numbers.
    No text of the data module's is among them, which may hold data or say where they lie, and no number of an option
    that is the user's own, which may be an id.
    """
    data = trainer.datamodule
    family: Any = [base for base in inspect.getmro(type(data)) if base.__module__.startswith(f"{_PACKAGE}.")]
    makers = [base.__init__ for base in family if "__init__" in vars(base)]
    values = {name: vars(data).get(name) for make in makers for name in inspect.signature(make).parameters}
    names = ("max_epochs", "max_steps", "precision", "world_size", "accumulate_grad_batches", "gradient_clip_val")
    seed = os.environ.get("PL_GLOBAL_SEED")
    run = {
        "objective": type(module).__name__,
        "seed": None if seed is None else int(seed),
        "data": {"class": type(data).__name__} | {n: v for n, v in values.items() if type(v) in (bool, int, float)},
        "trainer": {name: plain(getattr(trainer, name)) for name in names},
    }
    return {**module.hparams_initial, _RUN: run}


def tell_loggers(module: Any, trainer: Any) -> None:
    """Give :func:`for_loggers` to the Trainer's loggers."""
    values = for_loggers(module, trainer)
    for logger in trainer.loggers:
        logger.log_hyperparams(values)
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:  # which wrote an empty file before
            save_hparams_to_yaml(Path(logger.log_dir) / logger.NAME_HPARAMS_FILE, dict(logger.hparams))


def _positional(kind: type) -> list[str]:
    # Names of the arguments that can be given by place, also those handed on to a base as *args.
    names: list[str] = []
    for base in inspect.getmro(kind):
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if all(p.kind != p.VAR_POSITIONAL for p in parameters):
            break
    return names


def plain(value: Any) -> Any:
    """A value as nested dictionaries, lists, texts, numbers and None; objects as ``class_path`` and ``init_args``."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, Described):
        return _described(type(value), hyperparameters(value))
    if isinstance(value, _RECORDS):
        return _described(type(value), asdict(value))
    if isinstance(value, partial):
        # jsonargparse's have the class among the arguments, behind a function of its own.
        kinds = [part for part in (value.func, *value.args) if isinstance(part, type)]
        if len(kinds) == 1 and issubclass(kinds[0], _FACTORIES) and all(callable(part) for part in value.args):
            return _described(kinds[0], plain(value.keywords))
    return {_NOT_SAVED: type(value).__name__}


def _described(kind: type, init_args: Mapping[str, Any]) -> dict[str, Any]:
    return {"class_path": class_path(kind), "init_args": init_args}


def class_path(kind: type) -> str:
    """The name under which a class is written down and found again."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _missing(value: Any) -> bool:
    if isinstance(value, Mapping):
        return set(value) == {_NOT_SAVED} or any(map(_missing, value.values()))
    return isinstance(value, list) and any(map(_missing, value))


def restored(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that :func:`hyperparameters` wrote down.

    Nothing is imported for it, and only optimisers, schedulers and classes of this package and their subclasses are
    made: a checkpoint must not be able to run any code.

    Raises:
        UserError: If one cannot be made again and has to be given, naming it.
    """
    return {name: _made(value, name) for name, value in values.items()}


def _made(value: Any, argument: str) -> Any:
    if isinstance(value, list):
        return [_made(inner, argument) for inner in value]
    if not isinstance(value, Mapping):
        return value
    give = f"a value of yours: load_from_checkpoint(path, {argument}=...)"
    if set(value) == {_NOT_SAVED}:
        raise UserError(argument, value[_NOT_SAVED], f"{give}; a checkpoint cannot hold this one")
    inner = {key: _made(one, argument) for key, one in value.items()}
    if set(value) != {"class_path", "init_args"}:
        return inner
    bases: tuple[type, ...] = (Described, *_FACTORIES, *_RECORDS)
    for known in (kind for base in bases for kind in known_classes(base)):
        if class_path(known) == value["class_path"]:
            make = partial(known, **inner["init_args"])
            return make if issubclass(known, _FACTORIES) else make()
    raise UserError(argument, value["class_path"], f"{give}, or a class that has been imported")


def known_classes(base: type) -> Iterator[type]:
    """A class and all its subclasses that have been imported."""
    yield base
    subclasses: list[type] = base.__subclasses__()
    for kind in subclasses:
        yield from known_classes(kind)


class Restorable(Described):
    """A LightningModule that ``load_from_checkpoint`` makes again as it was: its class, its arguments, its weights."""

    def to_be_restored(self) -> dict[str, Any]:
        """What a checkpoint has to hold for it beside the weights."""
        return {_ARGUMENTS: hyperparameters(self), _CLASS: class_path(type(self))}

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | os.PathLike[str],
        map_location: Any = None,
        hparams_file: str | os.PathLike[str] | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Make an objective again from a checkpoint of ``fit``.

        Called on a base, ``UnlearningModule`` too, it gives an objective of the checkpoint's own class. ``kwargs``
        replace arguments of the checkpoint, or of ``hparams_file`` (YAML); those that neither can hold (a function, an
        object of a foreign class) have to be given. The others are Lightning's; without ``map_location`` all is on the
        CPU.

        Raises:
            UserError: If it is no checkpoint of such an objective, or an argument has to be given.
        """
        # Not by Lightning's own way, which has an argument named ``checkpoint`` itself.
        content = AtomicCheckpointIO().load_checkpoint(checkpoint_path, map_location or "cpu", weights_only)
        arguments = dict(content.get(_ARGUMENTS, {}))
        if hparams_file is not None:
            arguments |= load_hparams_from_yaml(Path(hparams_file))
            arguments.pop(_RUN, None)
        if _CLASS not in content:
            text = f"{checkpoint_path} holds no hyperparameters: whatever is not given now has its default"
            warnings.warn(f"load_from_checkpoint: {text}", stacklevel=2)
        kind: Any = _class_of(content.get(_CLASS), cls)
        made = kind(**restored({name: value for name, value in arguments.items() if name not in kwargs}), **kwargs)
        made.configure_model()
        made.on_load_checkpoint(content)
        weights = content["state_dict"]
        made.load_state_dict(weights, strict=made.strict_loading if strict is None else strict)
        return made.to(next(iter(weights.values())).device)


def _class_of(saved: str | None, wanted: type) -> type:
    # The class a checkpoint is of: the one asked for, or a subclass of it.
    if saved is None or saved in map(class_path, inspect.getmro(wanted)):
        return wanted
    for known in known_classes(wanted):
        if class_path(known) == saved:
            return known
    allowed = f"a checkpoint of {wanted.__name__}, or of a subclass that has been imported"
    raise UserError("checkpoint_path", f"one of {saved}", allowed)
