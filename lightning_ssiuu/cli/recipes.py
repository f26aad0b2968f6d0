"""Recipes by name, wherever a user stands, and ``lightning-ssiuu recipes``: list them, show one, copy one."""

from __future__ import annotations

import re
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any

import lightning_ssiuu
from lightning_ssiuu.utils.errors import Given, UserError
from lightning_ssiuu.utils.files import check_space, print_written, refuse_existing, written_atomically
from lightning_ssiuu.utils.messages import parsing
from lightning_ssiuu.utils.reading import reading

_PREFIX = "lightning_ssiuu:"
_WHOLE = "ssiuu"  # the recipe that is a whole job
_NAME = re.compile(r"[\w.~/:+-]+")  # no text in YAML, which has blanks, braces or line breaks
#: Up to a full stop or colon that ends a line or stands before a capital (not "Eq. 9").
_SENTENCE = re.compile(r".*?[.:](?=\n|$| [A-Z])", re.DOTALL)


def recipes_folder() -> Path:
    """Where the recipes are: in the installed package, or beside it in a checkout (an editable install's, too).

    Example:
        >>> (recipes_folder() / "ssiuu.yaml").is_file()
        True
    """
    package = Path(str(lightning_ssiuu.__file__)).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of all recipes, whole ones first: ``ssiuu``, ``model/smollm2``.

    Example:
        >>> {"ssiuu", "model/smollm2"} <= set(recipe_names())
        True
    """
    root = recipes_folder()
    names = [path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml")]
    return sorted(names, key=lambda name: ("/" in name, name))


def recipe_file(name: str, argument: str = "recipe") -> Path:
    """The file of a recipe, by its name; as well ``lightning_ssiuu:ssiuu``, ``ssiuu.yaml`` and ``recipes/ssiuu.yaml``.

    Raises:
        UserError: If there is none of that name; it says which ones are near.

    Example:
        >>> recipe_file("model/smollm").name
        Traceback (most recent call last):
        ...
        lightning_ssiuu.UserError: recipe: got 'model/smollm', allowed: a name that `lightning-ssiuu recipes` lists \
(did you mean model/smollm2 or model/smollm2_erase?)
    """
    if (found := _known(name)) is not None:
        return found
    raise UserError(argument, name, f"a name that `lightning-ssiuu recipes` lists{_meant(name)}")


def config_file(value: Any) -> Any:
    """What ``--config`` is to read: an existing file of that name first, else the recipe that is called so.

    Everything that cannot be a name (a whole configuration as text, ``-``, an address) is left as it is.

    Raises:
        UserError: If it is a name of neither.
    """
    if not isinstance(value, str) or not _NAME.fullmatch(value) or value == "-" or "://" in value:
        return value
    with reading("config", value, "an existing file"):  # no path at all: too long, no such user
        path = Path(value).expanduser()
        if path.exists() and not path.is_dir():
            return value
    if (found := _known(value)) is not None:
        return str(found)
    raise UserError("config", value, f"an existing file, or a name that `lightning-ssiuu recipes` lists{_meant(value)}")


def _known(name: str) -> Path | None:
    plain = _plain(name)
    return recipes_folder() / f"{plain}.yaml" if plain in recipe_names() else None


def _plain(name: str) -> str:
    return name.removeprefix(_PREFIX).removeprefix("recipes/").removesuffix(".yaml")


def _meant(name: str) -> str:
    # Recipes of a name like it, in whichever folder they lie.
    known = recipe_names()
    ends = get_close_matches(_end(_plain(name)), map(_end, known))
    near = [*get_close_matches(_plain(name), known), *(other for end in ends for other in known if _end(other) == end)]
    near = list(dict.fromkeys(near))[:3]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _end(name: str) -> str:
    return name.rpartition("/")[2]


def recipes(action: str = "list", name: str | None = None, dest: str | None = None, overwrite: bool = False) -> None:
    """List the recipes, show one, or copy one to a file of one's own.

    Args:
        action: ``list``, ``show`` or ``copy``.
        name: The recipe to show or to copy.
        dest: A file, or a directory that is there; by default the recipe's file name in the working directory.
        overwrite: Replace a file that is there.

    Raises:
        UserError: If there is no such recipe, or ``dest`` cannot be written.
    """
    if action == "list":
        if name is not None:
            raise UserError("NAME", name, "nothing after list: show or copy take a name")
        _print_list()
        return
    if name is None:
        raise UserError(
            "NAME", Given("nothing"), f"the recipe to {action}, e.g. lightning-ssiuu recipes {action} ssiuu"
        )
    file = recipe_file(name, "NAME")
    text = file.read_text(encoding="utf-8")
    if action == "show":
        print(text, end="")
        return
    target = Path(dest) if dest is not None else Path(file.name)
    if target.is_dir():
        target /= file.name
    refuse_existing("DEST", target.parent, [target.name], overwrite)
    check_space("DEST", target.parent, 1 << 16)
    with written_atomically(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print_written(target.parent, [target.name])


def _print_list() -> None:
    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {_first_sentence(name)}")
    print(f"\nlightning-ssiuu fit --config {_WHOLE} runs a whole one; parts compose: objective, model, data.")


def _first_sentence(name: str) -> str:
    # What a recipe says of itself; its line may end before the sentence does.
    lines = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    said = "\n".join(line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines))
    sentence = _SENTENCE.match(said)
    return " ".join((sentence[0] if sentence else said).split())


def run(args: list[str]) -> None:
    """Parse and run ``recipes``."""
    from jsonargparse import ArgumentParser

    text = "The recipes of the package, which --config takes by name: list them, show one, or copy one to change it."
    parser = ArgumentParser(prog="lightning-ssiuu recipes", description=text, exit_on_error=False)
    said = "list all recipes (the default), show one, or copy one to a file"
    parser.add_argument("action", nargs="?", default="list", choices=["list", "show", "copy"], help=said)
    parser.add_argument("name", nargs="?", type=str, metavar="NAME", help="a recipe, e.g. ssiuu or model/smollm2")
    text = "where to copy it: a file, or a directory (default: the recipe's file name, here)"
    parser.add_argument("dest", nargs="?", type=str, metavar="DEST", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    with parsing():
        config = parser.parse_args(args)
    recipes(config.action, config.name, config.dest, config.overwrite)
