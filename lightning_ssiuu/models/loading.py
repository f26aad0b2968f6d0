"""The one place that loads a causal language model, its tokenizer and its frozen reference copy."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
import transformers  # whose parts are imported when they are named
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.models.adapter_directory import base_of, is_adapter_directory, with_adapters
from lightning_ssiuu.models.architectures import Architecture, use_architecture
from lightning_ssiuu.models.checks import check_weights, fit_tokenizer
from lightning_ssiuu.models.quantization import check_reach, check_reading, loading_options, prepare_for_training
from lightning_ssiuu.utils.errors import UserError, naming
from lightning_ssiuu.utils.extras import check_extra
from lightning_ssiuu.utils.files import cache_directory, file_sha256
from lightning_ssiuu.utils.reading import read_json, reading
from lightning_ssiuu.utils.waiting import held_back

#: The embedded model: a transformers directory (setuptools installs packages unzipped, so it is a real path).
TINY = Path(str(files("lightning_ssiuu.models") / "tiny"))

_ALLOWED = '"tiny", a transformers directory with safetensors weights, a .gguf file, or a hub id'
_PACKAGE = "package:"
INDEX = "model.safetensors.index.json"
_TOKENIZER = "tokenizer_config.json"
_OBJECTS = ("config.json", _TOKENIZER, "tokenizer.json", "generation_config.json")
_ANY_LAYER = re.compile(r"\.\d+\.")
#: Where two models may not differ whose neurons are compared.
_SHAPE = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[A-Za-z0-9][\w./-]*)?")
_MOST_BASES = 10


def resolve_checkpoint(checkpoint: str | os.PathLike[str]) -> str:
    """Turn what the user wrote as ``checkpoint`` into what ``from_pretrained`` takes: a local directory or a hub id.

    It is ``"tiny"``, a local directory, a ``.gguf`` file, ``"package:NAME/FILE"`` for either inside an installed Python
    package (which is not imported), or a hub id, also ``ID@REVISION`` (a branch, tag or commit). A directory may hold
    adapters in peft's format instead of a model: they are merged into the model they name when it is loaded. A GGUF
    file is dequantised once into a cache directory (``$LIGHTNING_SSIUU_CACHE``, by default
    ``~/.cache/lightning_ssiuu``) under a name made from its content's hash, so later loads are fast and the model can
    be saved again.

    Raises:
        UserError: If it is none of those: a missing path, a directory without ``config.json``.
    """
    text = os.fspath(checkpoint)
    if text == "tiny":
        return str(TINY)
    with reading("checkpoint", text, _ALLOWED):  # no path at all: too long, no such user, a zero byte
        path = _inside_package(text) if text.startswith(_PACKAGE) else Path(text).expanduser()
        is_directory, is_file = path.is_dir(), path.is_file()
    if is_directory:
        _check_directory(path, text)
        return str(path)
    if is_file:
        if path.suffix != ".gguf":
            raise UserError("checkpoint", text, _ALLOWED)
        return str(_converted_gguf(path))
    if path.is_absolute() or text.startswith((".", "~")) or not _HUB_ID.fullmatch(text) or path.suffix == ".gguf":
        raise UserError("checkpoint", text, _ALLOWED)
    return text


def load_model(
    checkpoint: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    quantization: Literal["8bit", "4bit"] | None = None,
    device: torch.device | None = None,
    architecture: Architecture | None = None,
    **kwargs: Any,
) -> transformers.PreTrainedModel:
    """Load a causal language model in evaluation mode: safetensors only, no remote code, no cache, all of it trainable.

    Args:
        checkpoint: See :func:`resolve_checkpoint`.
        dtype: Type of the weights in memory; float32 is what training from 16-bit files wants by default.
        quantization: Load the projections in this width, frozen (:mod:`lightning_ssiuu.models.quantization`); what is
            not quantised is in ``dtype``.
        device: Where quantised weights go (None: the CPU). Others are loaded to the CPU, for a Trainer to move.
        architecture: Where its blocks and neurons are; None: as the table of
            :mod:`~lightning_ssiuu.models.architectures` says for its type.
        **kwargs: Passed to ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        UserError: If there is no such model, its weights are not safetensors, broken, incomplete, not finite or
            quantised already, bitsandbytes is missing, or ``architecture`` is not this model's.

    Example:
        >>> load_model("tiny").config.model_type
        'llama'
    """
    if (base := adapter_base(checkpoint)) is not None and quantization is not None:
        allowed = "null with a directory of adapters: merged weights are those of full precision"
        raise UserError("quantization", quantization, allowed)
    options: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True, "dtype": dtype} | kwargs
    if quantization is not None:
        options |= loading_options(quantization, dtype, device)
    plain_configuration(checkpoint)
    if base is None:
        model = _pretrained(checkpoint, options)
    else:
        model = load_model(base, dtype, **kwargs)
        if kwargs.get("device_map") != "meta":
            model = with_adapters(model, resolve_checkpoint(checkpoint))
    check_weights(model, os.fspath(checkpoint))
    model.config.use_cache = False
    if quantization is not None:
        check_reach(model, quantization)
        prepare_for_training(model)
        check_reading(model)
    if architecture is not None:
        use_architecture(model, architecture)
    return model


def check_loadable(checkpoint: str | os.PathLike[str]) -> None:
    """Refuse what :func:`load_model` would, as far as names, shapes and the configuration tell; no weight is read."""
    from transformers.utils import logging as transformers_logging

    plain_configuration(checkpoint)
    if (base := adapter_base(checkpoint)) is not None:
        check_loadable(base)
        return
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        options = {"trust_remote_code": False, "use_safetensors": True, "dtype": torch.float32, "device_map": "meta"}
        _pretrained(checkpoint, options)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def hub_options(checkpoint: str | os.PathLike[str]) -> tuple[str, dict[str, str]]:
    """What ``from_pretrained`` takes for a checkpoint: a directory or hub id, and the revision where one was named.

    Example:
        >>> hub_options("org/model@v1")
        ('org/model', {'revision': 'v1'})
    """
    source = resolve_checkpoint(checkpoint)
    name, _, revision = ("", "", "") if os.path.isdir(source) else source.partition("@")
    return (name, {"revision": revision}) if revision else (source, {})


def adapter_base(checkpoint: str | os.PathLike[str]) -> str | None:
    """The checkpoint that a directory of adapters belongs on; None for a checkpoint that is a model itself.

    Raises:
        UserError: If there is no such model, or the directory is not complete.
    """
    source = resolve_checkpoint(checkpoint)
    if not os.path.isdir(source) or not is_adapter_directory(source):
        return None
    base = base_of(source)
    try:
        resolve_checkpoint(base)
    except UserError as error:
        allowed = f"adapters on a model that is there (adapter_config.json names {base!r}: {error.allowed})"
        raise UserError("checkpoint", os.fspath(checkpoint), allowed) from error
    return base


def _model_of(checkpoint: str | os.PathLike[str]) -> str:
    # The checkpoint itself, or what its adapters, and perhaps those below, belong on.
    model = os.fspath(checkpoint)
    for _ in range(_MOST_BASES):
        if (base := adapter_base(model)) is None:
            return model
        model = base
    raise UserError("checkpoint", os.fspath(checkpoint), "adapters on a model, not on each other in a circle")


def _pretrained(checkpoint: str | os.PathLike[str], options: dict[str, Any]) -> transformers.PreTrainedModel:
    given, (source, revision) = os.fspath(checkpoint), hub_options(checkpoint)
    options = options | revision
    with held_back(), reading("checkpoint", given, _ALLOWED):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        # transformers would fill them with random numbers and go on.
        allowed = f"a checkpoint with all of its model's weights ({len(missing)} are missing, first {missing[0]})"
        raise UserError("checkpoint", given, allowed)
    _check_all_used(model, report["unexpected_keys"], given)
    return model


def load_tokenizer(checkpoint: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer, right padding, with a padding token in any case (EOS where it has none of use).

    Raises:
        UserError: If there is no tokenizer, it has no end-of-sequence token (answers must end somewhere), or tokens
            that the model has no embedding of.
    """
    source, revision = hub_options(checkpoint)
    if (base := adapter_base(checkpoint)) is not None and not os.path.isfile(os.path.join(source, _TOKENIZER)):
        return load_tokenizer(_model_of(base))
    with held_back(), reading("checkpoint", os.fspath(checkpoint), f"{_ALLOWED}, with a tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False, **revision)
    return prepared_tokenizer(tokenizer, checkpoint, embedding_rows(checkpoint))


def prepared_tokenizer(
    tokenizer: PreTrainedTokenizerBase, checkpoint: str | os.PathLike[str], rows: int | None
) -> PreTrainedTokenizerBase:
    """A tokenizer of a model with so many embeddings, in place: right padding, with a padding token in any case.

    Raises:
        UserError: As :func:`load_tokenizer`.
    """
    if not isinstance(tokenizer.model_max_length, (int, float)):
        raise UserError("checkpoint", os.fspath(checkpoint), "a tokenizer whose model_max_length is a number")
    if tokenizer.eos_token_id is None:
        raise UserError("checkpoint", os.fspath(checkpoint), "a tokenizer with an end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    fit_tokenizer(tokenizer, rows, os.fspath(checkpoint))
    tokenizer.padding_side = "right"
    return tokenizer


def frozen_reference(model: nn.Module) -> nn.Module:
    """Copy a model for use as the fixed reference: own storage, no gradients, evaluation mode."""
    reference = copy.deepcopy(model)
    for parameter in reference.parameters():
        parameter.grad = None
    return reference.requires_grad_(False).eval()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; after it every submodule is in the mode it was in, also where modes were mixed."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _inside_package(text: str) -> Path:
    name, _, inner = text.removeprefix(_PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / inner
        # Neither "..", nor an absolute path, nor a link leads out of it.
        if inner and path.exists() and path.resolve().is_relative_to(Path(folder).resolve()):
            return path
    raise UserError("checkpoint", text, f"package:NAME/FILE of an installed Python package ({name} has no such file)")


def _check_directory(folder: Path, given: str) -> None:
    # transformers takes whatever file an index names, and unpickles those that are not safetensors.
    if is_adapter_directory(folder):
        return
    if not (folder / "config.json").is_file():
        raise UserError("checkpoint", given, "a directory that holds a model (no config.json there)")
    for name in _OBJECTS:
        if (folder / name).exists():
            read_json(folder / name, "checkpoint")
    if not (folder / INDEX).exists():
        return
    files = read_json(folder / INDEX, "checkpoint").get("weight_map")
    names = set(map(str, files.values())) if isinstance(files, dict) else {""}
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            allowed = f"an index that names .safetensors files beside it alone ({INDEX} names {name[:100]!r})"
            raise UserError("checkpoint", given, allowed)


def _check_all_used(model: nn.Module, unexpected: Iterable[str], given: str) -> None:
    # Weights of a layer that the configuration does not count: transformers would leave the layer out.
    ours = {_ANY_LAYER.sub(".N.", name) for name, _ in model.named_parameters()}
    if unused := sorted(name for name in unexpected if _ANY_LAYER.sub(".N.", name) in ours):
        allowed = f"a configuration for all of the weights ({len(unused)} have no place in it, first {unused[0]})"
        raise UserError("checkpoint", given, allowed)


def _converted_gguf(path: Path) -> Path:
    status = path.stat()
    root = cache_directory()
    target = root / f"{path.stem}-{_digest(path, status.st_size, status.st_mtime_ns)[:16]}"
    if (target / "config.json").is_file():
        return target
    check_extra("gguf", "checkpoint", str(path), "a transformers directory")
    try:
        from transformers import GgufConfig

        config: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True)}
    except ImportError:  # transformers < 5.20 dequantises without being asked
        config = {}
    with held_back(), reading("checkpoint", str(path), "a GGUF file transformers can read"):
        folder, file_name = str(path.parent), path.name
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file_name, dtype=torch.float32, **config
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file_name)
    # What was loaded are plain float weights; the note on how they came about would make the saved copy unloadable.
    for holder in (model.config, model):
        if hasattr(holder, "quantization_config"):
            delattr(holder, "quantization_config")
    model.hf_quantizer = None
    model.is_quantized = False
    root.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=root))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        # Two first users at once: the second finds the directory in place and keeps the first's.
        if not target.exists():
            partial.chmod(0o755)
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    # Of a file of that size, last changed then: asked for whenever its checkpoint is named.
    return file_sha256(path)


def context_length(checkpoint: str | os.PathLike[str]) -> int | None:
    """The longest sequence a checkpoint's positions allow, in tokens; None when its configuration does not say."""
    return getattr(plain_configuration(checkpoint), "max_position_embeddings", None)


def check_same_shape(models: Mapping[str, str]) -> None:
    """Refuse models, by the name of their argument, whose layers and neurons are not those of the first."""
    first, shape = "", dict[str, Any]()
    for argument, checkpoint in models.items():
        with naming(argument):
            config = plain_configuration(checkpoint)
        own = {name: getattr(config, name, None) for name in _SHAPE}
        if not first:
            first, shape = argument, own
        if differing := [name for name in _SHAPE if own[name] != shape[name]]:
            name = differing[0]
            allowed = f"a model of the same shape as {first} (its {name} is {own[name]}, not {shape[name]})"
            raise UserError(argument, checkpoint, allowed)


def embedding_rows(checkpoint: str | os.PathLike[str]) -> int | None:
    """How many tokens a checkpoint's model has embeddings of; None where its configuration does not say."""
    rows = getattr(_configuration(checkpoint).get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None


def plain_configuration(checkpoint: str | os.PathLike[str]) -> Any:
    """The transformers configuration of a checkpoint.

    Raises:
        UserError: If it cannot be read, has no layers or no positions, or its weights are quantised already.
    """
    config = _configuration(checkpoint)
    if (packed := getattr(config, "quantization_config", None)) is not None:
        method = packed.get("quant_method") if isinstance(packed, dict) else type(packed).__name__
        allowed = f"a checkpoint with plain weights (this one is quantised already: {method})"
        raise UserError("checkpoint", os.fspath(checkpoint), allowed)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 1:  # the weights of all layers would be left out
        raise UserError("checkpoint", os.fspath(checkpoint), "a configuration whose num_hidden_layers is above 0")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and not (isinstance(positions, int) and positions > 0):
        raise UserError("checkpoint", os.fspath(checkpoint), "a configuration whose max_position_embeddings is above 0")
    return config


def _configuration(checkpoint: str | os.PathLike[str]) -> Any:
    source, revision = hub_options(_model_of(checkpoint))
    with held_back(), reading("checkpoint", os.fspath(checkpoint), _ALLOWED):
        return transformers.AutoConfig.from_pretrained(source, trust_remote_code=False, **revision)
