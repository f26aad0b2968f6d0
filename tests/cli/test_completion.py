"""The script is sourced by bash, which is then asked what it offers, as it asks when TAB is pressed."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from toys.cli import command, refused
from toys.docs import BASH

from lightning_ssiuu.__main__ import _COMMANDS
from lightning_ssiuu.attacks import Attack
from lightning_ssiuu.cli.completion import read_help, script
from lightning_ssiuu.cli.recipes import recipe_names
from lightning_ssiuu.objectives import objectives
from lightning_ssiuu.training.hyperparameters import known_classes

_ASK = """
source "$1"
shift
complete -p lightning-ssiuu >&2
COMP_WORDS=(lightning-ssiuu "$@")
COMP_CWORD=$#
_lightning_ssiuu
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def sourced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = command("completion", "bash")
    assert result.status == 0, result.err
    path = tmp_path_factory.mktemp("completion") / "lightning-ssiuu"
    path.write_text(result.out, encoding="utf-8")
    return path


def offered(path: Path, line: str) -> list[str]:
    """What follows a line; it ends with what was typed of the last word, `''` for nothing."""
    words = [BASH, "--norc", "-c", _ASK, "bash", str(path), *shlex.split(line)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "-F _lightning_ssiuu lightning-ssiuu" in done.stderr
    return done.stdout.split()


def test_commands_and_their_options(sourced: Path) -> None:
    assert offered(sourced, "''") == list(_COMMANDS)
    assert offered(sourced, "com") == ["completion", "compare"]
    for name in _COMMANDS:
        options = offered(sourced, f"{name} --")
        assert "--help" in options, name
        assert len(set(options)) == len(options)
    assert {"--trainer.max_steps", "--stopping.threshold", "--estimate-memory"} <= set(offered(sourced, "fit --"))
    assert "--estimate-memory" not in offered(sourced, "validate --")
    assert offered(sourced, "attack --sa") == ["--save_attacked"]
    assert offered(sourced, "doctor ''") == offered(sourced, "doctor -") == ["--help", "--json", "--hub"]


def test_recipes_are_offered_where_they_are_taken(sourced: Path) -> None:
    loggers = [name for name in recipe_names() if name.startswith("logger/")]
    assert loggers
    for line in ("fit --config", "fit -c", "attack --config ssiuu --config", "recipes show", "erase --fit"):
        assert offered(sourced, f"{line} ''") == recipe_names(), line
        assert offered(sourced, f"{line} logg") == loggers
    assert offered(sourced, "fit --config = logg") == loggers  # bash splits there
    assert offered(sourced, "fit --config =") == recipe_names()
    assert offered(sourced, "recipes ''") == ["list", "show", "copy"]


def test_words_and_classes(sourced: Path) -> None:
    assert offered(sourced, "attack --precision ''") == ["32-true", "bf16-mixed", "bf16-true"]
    assert offered(sourced, "erase --search ''") == ["own", "optuna"]
    assert set(objectives()) <= set(offered(sourced, "fit --model ''"))
    ours = {kind.__name__ for kind in known_classes(Attack) if kind.__module__.startswith("lightning_ssiuu")}
    assert len(set(offered(sourced, "attack --attack ''")) & ours) > 15
    assert offered(sourced, "attack --attack.help Qua") == ["Quantization"]
    assert offered(sourced, "attack --model ''") == []  # files: the shell's own


def test_help_is_read_as_argparse_writes_it() -> None:
    text = """options:
  -h, --help            Show this help.
  -c FILE, --config FILE
                        A file; --other is no option here.
  --a.b {x,y}           Choices. {not,these}
  --kind.help [CLASS]   About one, known subclasses: nothing
  --kind KIND           Which (type: Kind | null, known subclasses: lightning_ssiuu.One,
                        my_module.Two)
"""
    kinds = ["One", "Two"]
    options = {"--help": [], "--config": [], "--a.b": ["x", "y"], "--kind.help": kinds, "--kind": kinds}
    assert read_help(text) == options


def test_zsh_and_others() -> None:
    bash, zsh = (script(shell, {"doctor": {"--json": []}}) for shell in ("bash", "zsh"))
    assert zsh.splitlines()[3:] == bash.splitlines()[1:]
    assert "bashcompinit" in zsh
    refused(command("completion", "fish"), "SHELL", "bash", "zsh")
    refused(command("completion"), "SHELL", "for example: lightning-ssiuu completion bash")
