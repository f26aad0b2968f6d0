"""What a run was begun with, kept in its checkpoints, and what of it may be another when the run goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_ssiuu.callbacks.elicited import ElicitedLook, ElicitedStop
from lightning_ssiuu.callbacks.walk_back import WalkBack
from lightning_ssiuu.training.schedules import follows_length
from lightning_ssiuu.utils.errors import Given, UserError

#: Where a checkpoint holds the settings of its run.
KEY = "settings"
#: What changes neither weights nor scores, or no more than rounding does, or only when the run ends. An option stands
#: for all below it. docs/how-to/interrupted.md has the same list.
HARMLESS = frozenset(
    [
        *("ckpt_path", "weights_only", "overwrite", "estimate_memory", "config"),
        *("checkpoints", "saving", "report", "attribution.write"),
        *("data.init_args.num_workers", "data.init_args.eval_batch_size", "model.init_args.gradient_checkpointing"),
        *(
            f"trainer.{name}"
            for name in (
                # when it ends
                *("max_epochs", "max_steps", "min_epochs", "min_steps", "max_time"),
                # where it runs; batch sizes are of all ranks together
                *("accelerator", "devices", "num_nodes", "strategy", "use_distributed_sampler"),
                # what is looked at, written and shown
                *("callbacks", "logger", "log_every_n_steps", "default_root_dir", "enable_checkpointing", "profiler"),
                *("enable_progress_bar", "enable_model_summary", "enable_autolog_hparams", "model_registry"),
                *("check_val_every_n_epoch", "val_check_interval", "num_sanity_val_steps", "inference_mode"),
                *("limit_val_batches", "limit_test_batches", "limit_predict_batches"),
                *("detect_anomaly", "deterministic", "benchmark"),
            )
        ),
    ]
)

#: Sections within sections.
_SECTIONS = frozenset(options.section for options in (ElicitedLook, ElicitedStop, WalkBack))
#: Not harmless with a schedule that follows the number of steps.
_LENGTH = frozenset(["trainer.max_epochs", "trainer.max_steps"])


def run_settings(text: str) -> dict[str, Any]:
    """What determines a run, as plain values, of the text of its ``config.yaml``."""
    settings: dict[str, Any] = yaml.safe_load(text) or {}
    return _without(_harmless(settings), settings)


def check_settings(began: Mapping[str, Any], now: Mapping[str, Any], path: str | Path) -> None:
    """Raise a UserError that names the first option with another value than the run of a checkpoint began with.

    Options that one of the two does not know, as an earlier version's does not, are passed over.
    """
    for name, old, new in _differences(_without(_harmless(now), began), now, ""):
        allowed = f"{_shown(old)!r}, with which the run began ({Path(path).name})"
        raise UserError(name, _shown(new), f"{allowed}; --ckpt_path null and --overwrite begin anew")


def _harmless(settings: Mapping[str, Any]) -> frozenset[str]:
    model = settings.get("model")
    options = (model.get("init_args") if isinstance(model, Mapping) else None) or {}
    schedule = options.get("lr_scheduler")
    name = schedule.get("class_path") if isinstance(schedule, Mapping) else schedule
    if name is not None and follows_length(name, options.get("warmup_steps") or 0.0):
        return HARMLESS - _LENGTH
    return HARMLESS


def _without(names: frozenset[str], settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    return {
        key: _without(names, value, f"{above}{key}.") if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if f"{above}{key}" not in names
    }


def _differences(old: Any, new: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        if _class(old) != _class(new):
            yield f"{name}.class_path".lstrip("."), old.get("class_path"), new.get("class_path")
            return
        # Sections and classes have all their options; in a mapping of the user's an absent key is a value.
        has_all = name.count(".") == 0 or name.endswith(".init_args") or name in _SECTIONS
        for key in old if has_all else {**old, **new}:
            if not has_all or key in new:
                yield from _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new and not _moved(old, new):
        yield name, old, new


def _class(settings: Mapping[str, Any]) -> Any:
    """The class; one of this package by its name, whichever file it stood in."""
    path = str(settings.get("class_path"))
    return path.rsplit(".", 1)[-1] if path.startswith("lightning_ssiuu.") else path


def _moved(old: Any, new: Any) -> bool:
    """Whether both are the path of one file or directory, which may have been moved since."""
    if not (isinstance(old, str) and isinstance(new, str)):
        return False
    before, after = Path(old), Path(new)
    try:
        if not after.exists() or before.name != after.name:
            return False
        return not before.exists() or before.samefile(after)
    except (OSError, ValueError):  # too long for a path, or with a null byte: a text
        return False


def _shown(value: Any) -> Any:
    """A class or a mapping by its class alone."""
    if isinstance(value, Mapping):
        return Given(str(value.get("class_path", "a mapping")))
    return value
