"""Inputs that no command can use, by kind: options, configurations, data files, model directories, run directories.

``cases(seed, number)`` draws them from a far larger space. What is sensible in any setting is not in here.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from toys.bad_options import BOMB, OPTIONS
from toys.cli import DEFAULT

from lightning_ssiuu.models.loading import TINY

#: Stands in questions, answers and column names of all data files; no output may hold it.
SECRET = "Quetzalcoatl"


def _rows(first: int, count: int) -> list[dict[str, Any]]:
    return [{"question": f"{SECRET} {n}?", "answer": f"{SECRET} {n}"} for n in range(first, first + count)]


_DEEP = "[" * 200_000
_DIGITS = "9" * 5000
#: Contents of a configuration file.
CONFIGS: dict[str, bytes] = {
    "utf16": "seed_everything: 1\n".encode("utf-16"),
    "latin1": "nope: é\n".encode("latin-1"),
    "nul": b"seed_everything: 1\x00\n",
    "bomb": BOMB.encode(),
    "recursive": b"model: &a {init_args: *a}\n",
    "list": b"- 1\n- 2\n",
    "number": b"7\n",
    "text": b"nope\n",
    "open": b"model: [\n",
    "tab": b"model:\n\tclass_path: SSIUU\n",
    "tag": b"model: !!python/object/apply:os.system [true]\n",
    "own tag": b"data: !nope {a: 1}\n",
    "deep": ("data: " + "[" * 2000 + "]" * 2000).encode(),
    "unclosed": f"data: {_DEEP[:5000]}".encode(),
    "number key": b"7: 8\n",
    "null key": b"~: 8\n",
    "complex key": b"[1, 2]: 3\n",
    "two documents": b"data: Facts\n---\ndata: Facts\n",
    "unknown": b"nope: 1\n",
    "control": b'data: "a\\x1b[31mb"\n',
    "anchor": b"data: *nope\n",
    "digits": f"data: {_DIGITS}\n".encode(),
    "date": b"data: 2001-13-45\n",
    "binary": bytes(range(256)),
    "json list": b"[1, 2",
}


def _json_lines(*lines: str) -> bytes:
    return "\n".join(lines).encode()


_GOOD = json.dumps({"question": f"{SECRET}?", "answer": SECRET})
#: Contents of a data file by its suffix and kind.
DATA: dict[str, bytes] = {
    "deep.json": _DEEP.encode(),
    "deep.jsonl": _json_lines(_GOOD, _DEEP),
    "digits.json": f'[{{"question": {_DIGITS}, "answer": "{SECRET}"}}]'.encode(),
    "digits.jsonl": _json_lines(f'{{"question": {_DIGITS}, "answer": "{SECRET}"}}'),
    "empty.json": b"",
    "empty.jsonl": b"",
    "empty.csv": b"",
    "broken.json": f'[{{"question": "{SECRET}'.encode(),
    "broken.jsonl": _json_lines(_GOOD, _GOOD[:-3]),
    "number.json": b"7",
    "null.json": b"null",
    "text.json": f'"{SECRET}"'.encode(),
    "keyed.json": json.dumps({f"Who is {SECRET}?": SECRET}).encode(),
    "keyed rows.json": json.dumps([{f"Who is {SECRET}?": SECRET}]).encode(),
    "lists.json": json.dumps([[f"{SECRET}?", SECRET]]).encode(),
    "mixed.json": json.dumps([{"question": "a", "answer": "b"}, 7]).encode(),
    "nested.json": json.dumps([{"question": {SECRET: 1}, "answer": [SECRET]}]).encode(),
    "nulls.json": json.dumps([{"question": None, "answer": SECRET}]).encode(),
    "blank.json": json.dumps([{"question": " ", "answer": SECRET}]).encode(),
    "blank answer.jsonl": _json_lines(json.dumps({"question": SECRET, "answer": ""})),
    "no answers.json": json.dumps([{"question": SECRET}]).encode(),
    "some answers.jsonl": _json_lines(_GOOD, json.dumps({"question": SECRET})),
    "other names.json": json.dumps([{"Frage": SECRET, "Antwort": SECRET}]).encode(),
    "surrogate.json": b'[{"question": "\\ud800", "answer": "b"}]',
    "surrogate name.json": b'[{"\\ud800": "a"}]',
    "control name.json": json.dumps([{f"\x1b[31m{SECRET}": "a"}]).encode(),
    "data.json": json.dumps({"data": 7}).encode(),
    "no header.csv": f"Who is {SECRET}?,{SECRET}\nWhat?,{SECRET}\n".encode(),
    "nul.csv": f"question,answer\n{SECRET}\x00,b\n".encode(),
    "nul.json": b"\x00\x00\x00",
    "wide.csv": f"question,answer\n{SECRET},b,c,d\n".encode(),
    "narrow.csv": f"question,answer\n{SECRET}\n".encode(),
    "quote.csv": f'question,answer\n"{SECRET},b\n'.encode(),
    "blank.csv": b"question,answer\n , \n",
    "header.csv": b"question,answer\n",
    "huge cell.csv": f"question,answer\n{SECRET * 20_000},b\n".encode(),
    "bars.csv": f"question|answer\n{SECRET}|b\n".encode(),
    "conversation.json": json.dumps([{"messages": {"role": [SECRET], "content": 7}}]).encode(),
    "no turns.json": json.dumps([{"messages": [{"role": "assistant", "content": SECRET}]}]).encode(),
    "broken.parquet": f"PAR1{SECRET}PAR1".encode(),
    "latin1.csv": f"question,answer\n{SECRET}é,b\n".encode("latin-1"),
    "utf16.json": json.dumps(_rows(0, 2)).encode("utf-16"),
    "binary.jsonl": bytes(range(256)),
    "unknown.txt": _GOOD.encode(),
    "same.jsonl": _json_lines(_GOOD, _GOOD.replace("question", "nope")),
}


def _changed(**options: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        config = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
        (model / "config.json").write_text(json.dumps(config | options), encoding="utf-8")

    return change


def _instead(name: str, content: bytes | str | None) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        if content is not None:
            (model / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def _updated(name: str, **options: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        content = json.loads((TINY / name).read_text(encoding="utf-8"))
        _instead(name, json.dumps(content | options))(model)

    return change


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        tensors = load_file(TINY / "model.safetensors")
        change(tensors)
        (model / "model.safetensors").unlink()
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return write


def _indexed(file: str) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        (model / "model.safetensors").rename(model / "weights.safetensors")
        names = load_file(TINY / "model.safetensors")
        if file.endswith(".bin"):
            torch.save(names, model / file)
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
        (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    return write


def _index(content: object) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        (model / "model.safetensors").unlink()
        (model / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")

    return write


def _folder(name: str) -> Callable[[Path], None]:
    def make(model: Path) -> None:
        (model / name).unlink()
        (model / name).mkdir()

    return make


_EMBEDDING, _NORM = "model.embed_tokens.weight", "model.norm.weight"
_WRONG_JSON = {
    "list": "[1, 2]",
    "null": "null",
    "number": "7",
    "text": '"x"',
    "empty": "",
    "broken": '{"a": ',
    "deep": _DEEP,
    "digits": f'{{"vocab_size": {_DIGITS}, "model_type": "llama"}}',
    "utf16": '{"model_type": "llama"}'.encode("utf-16"),
    "binary": bytes(range(256)),
}
_WRONG_SIZES: dict[str, list[Any]] = {
    "hidden_size": ["many", -128, 0, 127, 64, None, [128], 1.5],
    "num_attention_heads": [0, -4, "x", None],
    "num_key_value_heads": [0, 3, -2, "x"],
    "num_hidden_layers": [40, "x", None, -1, 0],
    "head_dim": [0, -1, 33, "x"],
    "intermediate_size": [100, -1, "x", None],
    "vocab_size": [10, -1, "x", None, 2**70],
    "max_position_embeddings": ["x", -5, 0],
    "rms_norm_eps": ["x", None, []],
    "hidden_act": ["nope", 7, None, []],
    "rope_parameters": [{"rope_type": "nope"}, "x", 7, {"rope_type": "default", "rope_theta": "x"}],
    "model_type": ["nope", "bert", "", None, 7, []],
    "quantization_config": ["x", 7, {"quant_method": "nope"}],
    "pad_token_id": ["x"],
}

#: Changes of a copy of the embedded model.
MODELS: dict[str, Callable[[Path], None]] = {
    **{f"config {kind}": _instead("config.json", content) for kind, content in _WRONG_JSON.items()},
    **{f"config {name} {v}"[:60]: _changed(**{name: v}) for name, values in _WRONG_SIZES.items() for v in values},
    **{f"tokenizer {kind}": _instead("tokenizer.json", content) for kind, content in _WRONG_JSON.items()},
    **{f"tokenizer_config {kind}": _instead("tokenizer_config.json", c) for kind, c in _WRONG_JSON.items()},
    "tokenizer without a model": _updated("tokenizer.json", model=None),
    "tokenizer of another kind": _updated("tokenizer.json", model={"type": "nope"}),
    "tokenizer decoder": _updated("tokenizer.json", decoder=7),
    "tokenizer class": _updated("tokenizer_config.json", tokenizer_class=7),
    "tokenizer eos number": _updated("tokenizer_config.json", eos_token=7),
    "tokenizer eos list": _updated("tokenizer_config.json", eos_token=["x"]),
    "tokenizer without eos": _updated("tokenizer_config.json", eos_token=None),
    "tokenizer max length": _updated("tokenizer_config.json", model_max_length="x"),
    "no tokenizer": lambda model: [_instead(f"tokenizer{end}.json", None)(model) for end in ("", "_config")] and None,
    "generation list": _instead("generation_config.json", "[1]"),
    "generation broken": _instead("generation_config.json", "{"),
    "weights empty": _instead("model.safetensors", b""),
    "weights garbage": _instead("model.safetensors", b"x" * 1000),
    "weights header": _instead("model.safetensors", b"\xff" * 8 + b"{}"),
    "weights truncated": _instead("model.safetensors", (TINY / "model.safetensors").read_bytes()[:100_000]),
    "weights absent": _instead("model.safetensors", None),
    "weights folder": _folder("model.safetensors"),
    "config folder": _folder("config.json"),
    "tensor missing": _tensors(lambda tensors: tensors.pop(_NORM)),
    "tensor narrow": _tensors(lambda tensors: tensors.update({_NORM: tensors[_NORM][:64].clone()})),
    "tensor turned": _tensors(lambda tensors: tensors.update({_EMBEDDING: tensors[_EMBEDDING].T.contiguous()})),
    "tensor scalar": _tensors(lambda tensors: tensors.update({_NORM: torch.zeros(())})),
    "tensor empty": _tensors(lambda tensors: tensors.update({_NORM: torch.zeros(0)})),
    "tensors none": _tensors(lambda tensors: tensors.clear()),
    "tensors of another model": _tensors(lambda tensors: [tensors.clear(), tensors.update(x=torch.zeros(1))]),
    "index of a pickle": _indexed("pytorch_model-1.bin"),
    "index of a parent": _indexed("../weights.safetensors"),
    "index of nothing": _indexed("absent.safetensors"),
    "index absolute": _indexed(str(TINY / "model.safetensors")),
    "index list": _index([1]),
    "index null": _index(None),
    "index without map": _index({"metadata": {}}),
    "index map list": _index({"metadata": {}, "weight_map": ["x"]}),
    "index number": _index({"metadata": {}, "weight_map": {_NORM: 7}}),
    "adapter list": _instead("adapter_config.json", "[1]"),
}

#: Commands that read all files of a run.
_OF_RUNS = ("attack", "compare")
#: Contents of the files of a finished run.
RUNS: dict[str, Mapping[str, str | bytes]] = {
    f"{name} {kind}": {name: content}
    for name in ("metrics.json", "config.yaml")
    for kind, content in _WRONG_JSON.items()
    if not (name == "config.yaml" and kind in ("digits", "deep"))
}
_RUN = {"metrics.json": '{"objective": "SSIUU", "score": "all_tokens"}', "config.yaml": "data: Facts\n"}


@dataclass(frozen=True)
class BadInput:
    """One of them: its kind, a name, and what makes the arguments, given a folder for files and an output directory."""

    kind: str
    name: str
    arguments: Callable[[Path, Path], list[str]]


def _command(name: str, run: Path, **models: str) -> list[str]:
    # A command that would succeed but for what is added to it.
    if name in ("fit", "validate"):
        checkpoint = ["--model.init_args.checkpoint", models["checkpoint"]] if models else []
        short = ["--trainer.max_steps", "1", "--stopping.threshold", "null"] if name == "fit" else []
        return [name, "--config", str(DEFAULT), "--trainer.default_root_dir", str(run), *short, *checkpoint]
    roles = ("original", "unlearned") if name == "audit" else ("model",)
    given = dict.fromkeys(roles, "tiny") | models
    short = ["--attack.learning_rates", "[0.001]", "--attack.seeds", "[0]"] if name == "attack" and models else []
    return [name, *short, *(word for role, path in given.items() for word in (f"--{role}", path)), "--output", str(run)]


def _options() -> Iterator[BadInput]:
    for command, options in OPTIONS.items():
        for option, values in options.items():
            for value in values:

                def arguments(
                    folder: Path, run: Path, command: str = command, option: str = option, value: str = value
                ) -> list[str]:
                    start = ["compare", str(folder)] if command == "compare" else _command(command, run)
                    return [*start, *([f"--{option}={value}"] if value[:1] == "-" else [f"--{option}", value])]

                yield BadInput(f"{command} option", f"{option} {value[:40]!r}", arguments)


def _configs() -> Iterator[BadInput]:
    for command in ("fit", "validate", "attack", "audit", "utility", "privacy"):
        for name, content in CONFIGS.items():

            def arguments(folder: Path, run: Path, command: str = command, content: bytes = content) -> list[str]:
                (folder / "given.yaml").write_bytes(content)
                return [*_command(command, run), "--config", str(folder / "given.yaml")]

            yield BadInput("config", f"{command} {name}", arguments)


def _data() -> Iterator[BadInput]:
    for name, content in DATA.items():
        for command in ("fit", "attack", "audit"):

            def arguments(
                folder: Path, run: Path, command: str = command, name: str = name, content: bytes = content
            ) -> list[str]:
                (folder / name).write_bytes(content)
                (folder / "good.jsonl").write_text("\n".join(map(json.dumps, _rows(50, 8))), encoding="utf-8")
                sets = {"forget": str(folder / name), "retain": str(folder / "good.jsonl")}
                sizes = {"batch_size": 1, "retain_batch_size": 1} if command == "fit" else {}
                section = {"data": {"class_path": "CustomData", "init_args": sets | sizes}}
                (folder / "data.json").write_text(json.dumps(section), encoding="utf-8")
                return [*_command(command, run), "--config", str(folder / "data.json")]

            yield BadInput("data", f"{command} {name}", arguments)

        def nonmembers(folder: Path, run: Path, name: str = name, content: bytes = content) -> list[str]:
            (folder / name).write_bytes(content)
            return [*_command("privacy", run), "--nonmembers", str(folder / name)]

        yield BadInput("data", f"privacy {name}", nonmembers)


_ROLES = [
    *(("fit", "checkpoint"), ("validate", "checkpoint"), ("attack", "model"), ("attack", "oracle")),
    *(("audit", "original"), ("audit", "unlearned"), ("audit", "oracle"), ("privacy", "model"), ("privacy", "oracle")),
    ("utility", "model"),
]


def _models() -> Iterator[BadInput]:
    for name, change in MODELS.items():
        for command, role in _ROLES:

            def arguments(
                folder: Path, run: Path, command: str = command, role: str = role, change: Any = change
            ) -> list[str]:
                model = folder / "spoilt"
                shutil.copytree(TINY, model)
                change(model)
                return _command(command, run, **{role: str(model)})

            yield BadInput("model", f"{command} {role} {name}", arguments)


def _runs() -> Iterator[BadInput]:
    for name, files in RUNS.items():
        for command in _OF_RUNS:

            def arguments(folder: Path, run: Path, command: str = command, files: Any = files) -> list[str]:
                for file, content in {**_RUN, **files}.items():
                    (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
                if command == "compare":
                    return ["compare", str(folder), "--output", str(run)]
                shutil.copytree(TINY, folder / "model")
                return _command(command, run, model=str(folder / "model"))

            yield BadInput("run", f"{command} {name}", arguments)


#: All of them by kind.
KINDS: dict[str, list[BadInput]] = {
    "options": list(_options()),
    "configs": list(_configs()),
    "data": list(_data()),
    "models": list(_models()),
    "runs": list(_runs()),
}


def cases(seed: int, shares: Mapping[str, int]) -> list[BadInput]:
    """A draw of so many of each kind."""
    draw = random.Random(seed)
    return [case for kind, share in shares.items() for case in draw.sample(KINDS[kind], min(share, len(KINDS[kind])))]
