"""The pages of the reference, made from the source when the site is built: they cannot go stale. Imports no torch."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from griffe import Extension
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, whether or not it is installed

import lightning_ssiuu  # noqa: E402
from lightning_ssiuu.__main__ import _COMMANDS, _EXAMPLES  # noqa: E402
from lightning_ssiuu.cli.recipes import _first_sentence, recipe_names, recipes_folder  # noqa: E402
from lightning_ssiuu.evaluation.json_files import JSON_FILES  # noqa: E402

#: Rooms of the package with public names, as the navigation calls them.
ROOMS = {
    "cli": "Functions",
    "objectives": "Objectives",
    "regularizers": "Regularisers",
    "attacks": "Attacks",
    "datamodules": "Data",
    "callbacks": "Callbacks",
    "models": "Models",
    "training": "Training",
    "utils": "Errors",
}
#: The sections of a configuration that are classes of any name: which page lists them.
ANY_CLASS = {"model": "objectives.md", "data": "datamodules.md", "attack": "attacks.md"}
_CONFIG = "A YAML file with these options, or a recipe's name; may be given several times."
_STATUSES = "Exit statuses](../how-to/runs.md#exit-statuses)"


class Docstrings(Extension):
    """``Example:`` is the examples' section for griffe, too, and Sphinx's roles are plain code."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r":\w+:`~?([\w.]+)`", lambda role: f"`{role[1].split('.')[-1]}`", text)


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages to those of docs/."""
    pages = {room: _room(room, title) for room, title in ROOMS.items()}
    pages |= {"commands": _commands(), "recipes": _recipes(), "files": _files()}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def _room(room: str, title: str) -> str:
    exports = lightning_ssiuu._EXPORTS
    names = sorted((name for name, module in exports.items() if module.partition(".")[0] == room), key=str.lower)
    said = f"All are imported from `lightning_ssiuu`. Path of the sources: `lightning_ssiuu/{room}/`.\n"
    return "\n".join([f"# {title}\n", said, *(f"::: lightning_ssiuu.{exports[name]}.{name}\n" for name in names)])


def _recipes() -> str:
    text = ["# Recipes\n", "`--config NAME` takes each by its name; several compose, and later ones win key by key."]
    text += ["[How they compose](../how-to/runs.md#recipes).\n"]
    folder = None
    for name in recipe_names():
        if (here := name.rpartition("/")[0]) != folder:
            folder = here
            text += [f"## {folder or 'Whole jobs'}\n"]
        content = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8")
        text += [f"### {name} {{#{name.replace('/', '-')}}}\n", f"{_escaped(_first_sentence(name))}\n"]
        text += [f"```yaml\n{content.rstrip()}\n```\n"]
    return "\n".join(text)


def _files() -> str:
    text = ["# JSON files\n", "What commands write, with the fields at the top. None holds text of the forget set.\n"]
    for name, file in JSON_FILES.items():
        text += [f"## {name}\n", f"Written by {file.written_by}. Schema: {file.schema}.\n"]
        fields = (file.fields | {name: f"({said})" for name, said in file.sometimes.items()}).items()
        text += _table(("field", "what it is"), ((f"`{field}`", _escaped(said)) for field, said in fields))
    return "\n".join(text)


def _commands() -> str:
    text = [
        "# Commands\n",
        "`lightning-ssiuu COMMAND --help` prints the same. An option that takes a class is followed",
    ]
    text += ["by the class's own: `--attack.p`, `--data.init_args.batch_size`.", f"[{_STATUSES}.\n"]
    for name, (module, said) in _COMMANDS.items():
        text += [f"## {name}\n", f"{said[0].upper()}{said[1:]}.\n"]
        text += [f"```\nlightning-ssiuu {name} {_EXAMPLES[name]}\n```\n"] if name in _EXAMPLES else []
        tree = _tree(module)
        if module.endswith(".fit"):
            text += _table(("option", "what it is"), [*_sections(tree, name)])
        elif "add_argument(" in ast.unparse(_function(tree, "run")):
            text += _table(("option", "what it is"), _spelled_out(_function(tree, "run")))
        else:
            rows = _parameters(module, name.replace("-", "_"))
            text += _table(("option", "default", "what it is"), rows)
    return "\n".join(text)


def _sections(tree: ast.Module, command: str) -> Iterator[tuple[str, str]]:
    """The sections of a configuration, and what stands beside them."""
    yield "`--config`", _CONFIG
    for section, said in {"model": "An objective", "data": "A data module"}.items():
        yield f"`--{section}`", f"{said}: its class, and `--{section}.init_args.*` ([classes]({ANY_CLASS[section]}))."
    yield "`--trainer.*`", "Lightning's Trainer."
    yield "`--seed_everything`", "The seed of the run (0)."
    yield "`--ckpt_path`", "A checkpoint to go on from; `last`, `hpc` or a path."
    for call in _calls(_function(tree, "add_arguments_to_parser")):
        if call.func.attr in ("add_lightning_class_args", "add_class_arguments"):
            kind, section = ast.unparse(call.args[0]), ast.literal_eval(call.args[1])
            module = next(iter(_imported(tree, kind)))
            for option, _, text in _documented(module, kind):
                yield f"`--{section}.{option}`", text
    yield from _spelled_out(_function(tree, "add_arguments_to_parser"))
    if command == "fit":
        yield from _spelled_out(_function(tree, "_prepare_subcommand_parser"))


def _parameters(module: str, function: str) -> Iterator[tuple[str, str, str]]:
    """The options of a command that is a function: its parameters."""
    yield "`--config`", "", _CONFIG
    for option, default, text, kind in _documented(module, function, kinds=True):
        if kind.startswith("Devices"):
            yield from _options("--", "lightning_ssiuu.training.devices", "Devices")
            continue
        page = ANY_CLASS.get(option) if "DataModule" in kind or kind.startswith("Attack") else None
        yield f"`--{option}`", default, text + (f" [Classes]({page})." if page else "")
        if option == "probe":
            yield from _options("--probe.", "lightning_ssiuu.reports.audit.evidence", "RelearningProbe")


def _options(prefix: str, module: str, kind: str) -> Iterator[tuple[str, str, str]]:
    for option, default, text in _documented(module, kind):
        yield f"`{prefix}{option}`", default, text


def _documented(module: str, name: str, kinds: bool = False) -> Iterator[tuple[str, ...]]:
    """(option, default, what it is[, annotation]) of a function's or class's arguments, from source and docstring."""
    from griffe import Docstring, Parser

    tree = _tree(module)
    thing = next((n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name), None)
    if thing is None:  # a room's __init__ has it from a file of its own
        yield from _documented(next(iter(_imported(tree, name))), name, kinds)
        return
    sections = Docstring(ast.get_docstring(thing) or "", parser=Parser.google).parse(warnings=False)
    told = {one.name: one.description for section in sections if section.kind == "parameters" for one in section.value}
    for option, kind, default in _signature(thing):
        yield (option, default, _escaped(told.get(option, ""))) + ((kind,) if kinds else ())


def _signature(thing: ast.FunctionDef | ast.ClassDef) -> Iterator[tuple[str, str, str]]:
    if isinstance(thing, ast.ClassDef):
        init = next((n for n in thing.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if init is None:  # a dataclass
            for field in thing.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    yield field.target.id, ast.unparse(field.annotation), _code(field.value)
            return
        thing = init
    args = [arg for arg in thing.args.args if arg.arg != "self"]
    defaults: list[Any] = [None] * (len(args) - len(thing.args.defaults)) + thing.args.defaults
    for arg, default in zip(args, defaults, strict=True):
        yield arg.arg, ast.unparse(arg.annotation) if arg.annotation else "", _code(default)


def _code(value: ast.expr | None) -> str:
    return "required" if value is None else f"`{ast.unparse(value)}`".replace("`None`", "")


def _spelled_out(function: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    """The options that a function adds one by one, with their help."""
    known: dict[str, str] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            known.setdefault(f"{node.targets[0].id} {node.lineno}", ast.unparse(node.value))
    for call in _calls(function):
        if call.func.attr == "add_argument":
            (value,) = (keyword.value for keyword in call.keywords if keyword.arg == "help")
            if isinstance(value, ast.Name):  # the assignment before
                lines = [key for key in known if key.split()[0] == value.id and int(key.split()[1]) < call.lineno]
                value = ast.parse(known[max(lines, key=lambda key: int(key.split()[1]))], mode="eval").body
            names = ", ".join(f"`{ast.literal_eval(arg)}`" for arg in call.args)
            said = ast.literal_eval(value)
            yield names, f"{said[0].upper()}{said[1:]}."


def _calls(function: ast.FunctionDef) -> list[ast.Call]:
    found = [n for n in ast.walk(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    return sorted(found, key=lambda call: call.lineno)


def _tree(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _function(tree: ast.Module, name: str) -> ast.FunctionDef:
    return next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)


def _imported(tree: ast.Module, name: str) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            yield str(node.module)


def _table(head: tuple[str, ...], rows: Any) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines] + [""]


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;")
