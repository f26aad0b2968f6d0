"""``lightning-ssiuu completion``: a script by which bash or zsh completes commands, options, words and recipes."""

from __future__ import annotations

import io
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from importlib import import_module
from typing import Literal, get_args

from lightning_ssiuu.cli.recipes import recipe_names
from lightning_ssiuu.utils.errors import check_choice
from lightning_ssiuu.utils.messages import parsing
from lightning_ssiuu.utils.version import version

Shell = Literal["bash", "zsh"]
_ENTRY = re.compile(r"^  (?=-)", re.MULTILINE)
_OPTION = re.compile(r"(?<![\w.-])--[\w.-]*\w")
_CHOICES = re.compile(r"\{([^{}]+)\}")
_CLASSES = re.compile(r"known subclasses: ([\w., ]+)\)")
#: What no help lists, by command and word before; recipes' names after `None`.
_PLAIN: dict[str, tuple[str, ...] | None] = {
    "recipes recipes": ("list", "show", "copy"),
    "recipes show": None,
    "recipes copy": None,
    "erase --fit": None,
    "erase --recipe": None,
    "completion completion": get_args(Shell),
}
_ZSH = """(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
autoload -Uz bashcompinit && bashcompinit
"""
# Words are given by the one before; options where a dash or nothing was typed. Without any, the shell offers files.
_SCRIPT = """\
# lightning-ssiuu VERSION, `lightning-ssiuu completion SHELL`: to be made anew after an update.
PREFACE_lightning_ssiuu() {
    local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words=""
    if [[ "$current" == "=" ]]; then
        current=""
    elif [[ "$before" == "=" ]]; then
        before="${COMP_WORDS[COMP_CWORD-2]}"
    fi
    if [[ "$COMP_CWORD" -eq 1 ]]; then
        words=COMMANDS
    elif [[ "$current" != -* ]]; then
        case "${COMP_WORDS[1]} $before" in
            *" --config"|*" -c"PLAIN) words=RECIPES ;;
WORDS
        esac
    fi
    if [[ -z "$words" ]] && [[ "$current" == -* || ( -z "$current" && "$before" != -* ) ]]; then
        case "${COMP_WORDS[1]}" in
OPTIONS
        esac
    fi
    COMPREPLY=( $(compgen -W "$words" -- "$current") )
}
complete -o default -F _lightning_ssiuu lightning-ssiuu
"""


def completion(shell: Shell = "bash") -> str:
    """Print the script for a shell, and return it.

    It is made of what every command's ``--help`` says, so it knows the options of this version, and takes seconds.

    Args:
        shell: ``bash`` or ``zsh``.
    """
    # The dispatcher alone knows all commands, and imports none of them.
    import lightning_ssiuu.__main__ as dispatcher

    known = {name: options_of(name, module) for name, (module, _) in dispatcher._COMMANDS.items()}
    text = script(shell, known)
    print(text, end="")
    return text


def options_of(name: str, module: str) -> dict[str, list[str]]:
    """The options of a command by its ``--help``, each with the words that it takes, as far as they are listed."""
    shown = io.StringIO()
    arguments = [name, "--help"] if module == "lightning_ssiuu.cli.fit" else ["--help"]
    with redirect_stdout(shown), _wide(), suppress(SystemExit):
        import_module(module).run(arguments)
    return read_help(shown.getvalue())


@contextmanager
def _wide() -> Iterator[None]:
    # Inside, no name is broken in two at the end of a line.
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def read_help(text: str) -> dict[str, list[str]]:
    r"""What argparse's help says of options: their names, and after each its choices or classes.

    >>> read_help("options:\n  -q, --quiet   say nothing of --loud\n  --size {s,m}  how large\n")
    {'--quiet': [], '--size': ['s', 'm']}
    """
    found: dict[str, list[str]] = {}
    for entry in _ENTRY.split(text)[1:]:
        head = re.split(r"\s{2,}|\n", entry, maxsplit=1)[0]
        choices, classes = _CHOICES.search(head), _CLASSES.search(" ".join(entry.split()))
        words = choices[1].split(",") if choices else []
        if classes:  # which are found by their names alone
            words = [path.rpartition(".")[2] for path in classes[1].split(", ")]
        found |= dict.fromkeys(_OPTION.findall(head), words)
    helped = {f"{name}.help": words for name, words in found.items() if words and f"{name}.help" in found}
    return found | helped


def script(shell: Shell, known: Mapping[str, Mapping[str, list[str]]]) -> str:
    """The script for these commands and options."""
    given = {f"{command} {name}": words for command, own in known.items() for name, words in own.items() if words}
    given |= {before: list(words) for before, words in _PLAIN.items() if words}
    recipes = [shlex.quote(before) for before, words in _PLAIN.items() if words is None]
    text = {
        "VERSION": version(),
        "SHELL": shell,
        "PREFACE": _ZSH if shell == "zsh" else "",
        "COMMANDS": _quoted(known),
        "PLAIN": "".join(f"|{before}" for before in recipes),
        "RECIPES": _quoted(recipe_names()),
        "WORDS": "\n".join(_case(shlex.quote(before), words) for before, words in given.items()),
        "OPTIONS": "\n".join(_case(command, own) for command, own in known.items()),
    }
    return re.sub("|".join(rf"\b{name}(?=\b|_)" for name in text), lambda found: text[found[0]], _SCRIPT)


def _case(pattern: str, words: Iterable[str]) -> str:
    return f"            {pattern}) words={_quoted(words)} ;;"


def _quoted(words: Iterable[str]) -> str:
    return shlex.quote(" ".join(words))


def run(args: list[str]) -> None:
    """Parse and run ``completion``."""
    from jsonargparse import ArgumentParser

    text = "A script by which a shell completes commands, options and recipes (docs/how-to/command_line.md says how)."
    parser = ArgumentParser(prog="lightning-ssiuu completion", description=text, exit_on_error=False)
    parser.add_argument("shell", nargs="?", type=str, metavar="SHELL", help="bash or zsh (by its bashcompinit)")
    with parsing():
        config = parser.parse_args(args)
    check_choice("SHELL", config.shell, Shell)
    completion(config.shell)
