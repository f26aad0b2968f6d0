"""The command line: a dispatcher that imports nothing heavy until it knows what is wanted."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module

_COMMANDS = {
    "erase": ("lightning_ssiuu.cli.erase", "all of it: search the settings, unlearn, attack, audit, certify"),
    "fit": ("lightning_ssiuu.cli.fit", "unlearn (or fine-tune) with a recipe: fit --config ssiuu"),
    "validate": ("lightning_ssiuu.cli.fit", "score a model on the forget, retain and test sets"),
    "test": ("lightning_ssiuu.cli.fit", "the same through Lightning's test loop"),
    "attack": ("lightning_ssiuu.cli.attack", "relearning attacks on a saved model, beside an oracle"),
    "audit": ("lightning_ssiuu.cli.audit", "erased or hidden? compare a model before and after unlearning"),
    "certify": ("lightning_ssiuu.cli.certify", "a certificate of an audited run, to print and to hand out"),
    "verify": ("lightning_ssiuu.cli.verify", "is this the model of a certificate? are these rows among the forgotten?"),
    "publish": ("lightning_ssiuu.cli.publish", "push a run's model to the Hugging Face hub, with a model card"),
    "utility": ("lightning_ssiuu.cli.utility", "what a model can do besides: embedded items, or lm-eval's tasks"),
    "evaluate": ("lightning_ssiuu.cli.evaluate", "a benchmark by its own protocol: evaluate --suite tofu"),
    "privacy": ("lightning_ssiuu.cli.privacy", "membership inference and forget quality, beside an oracle"),
    "oracle": ("lightning_ssiuu.cli.oracle", "train the embedded model anew without the forget set"),
    "doctor": ("lightning_ssiuu.cli.doctor", "versions, devices, extras, and what works here; --json for bug reports"),
    "recipes": ("lightning_ssiuu.cli.recipes", "list the recipes that --config takes by name; show or copy one"),
    "completion": (
        "lightning_ssiuu.cli.completion",
        "a script by which a shell completes options: completion bash",
    ),
    "compare": ("lightning_ssiuu.cli.compare", "finished runs in one table, as CSV, Markdown, LaTeX and plots"),
    "meta-evaluate": ("lightning_ssiuu.cli.meta_evaluate", "which scores tell models with the knowledge from others"),
    "leaderboard": ("lightning_ssiuu.cli.leaderboard", "audited models on one page: verdict, gap to the oracle, cost"),
}

#: What to give a command that needs more than its name.
_EXAMPLES = {
    "fit": "--config ssiuu",
    "validate": "--config ssiuu",
    "test": "--config ssiuu",
    "attack": "--model runs/ssiuu/model",
    "audit": "--original tiny --unlearned runs/ssiuu/model",
    "utility": "--model tiny --output runs/tiny",
    "evaluate": "--suite tofu --model runs/ssiuu/model --path DIR",
    "privacy": "--model runs/ssiuu/model",
    "completion": "bash",
    "publish": "runs/ssiuu --output published",
    "compare": "runs/*",
    "meta-evaluate": "--knowing '[tiny]' --ignorant '[runs/oracle/model]' --output runs/meta",
    "leaderboard": "runs/*",
}

_INTERRUPTED = 130  # what a shell reports for Ctrl-C
_UNREAD = 141  # what a shell reports for SIGPIPE
_PATIENCE = 5.0  # seconds in which the first process of a run ends the others, if it has found the same mistake

_USAGE = """usage: lightning-ssiuu COMMAND [options]

{commands}

  lightning-ssiuu COMMAND --help lists a command's options; --version prints version and commit.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    That is 0, 2 for a mistake of the user's, told in one line, 130 after Ctrl-C, 143 after SIGTERM, and 141 if
    whatever reads the output has ended (``| head``).

    Args:
        argv: Arguments without the program's name; None takes the process's.

    Example:
        >>> main(["--version"])  # doctest: +ELLIPSIS
        0.1.0...
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, _COMMANDS))
        lines = "\n".join(f"  {name:<{width}} {text}" for name, (_, text) in _COMMANDS.items())
        print(_USAGE.format(commands=lines))
        return 0
    if arguments[0] == "--version":
        from lightning_ssiuu.utils.version import version

        print(version())
        return 0
    if arguments[0] not in _COMMANDS:
        return _refuse(f"COMMAND: got {arguments[0]!r}, allowed: {', '.join(_COMMANDS)}")
    _find_modules_here()
    module, _ = _COMMANDS[arguments[0]]
    is_trainer_command = module == "lightning_ssiuu.cli.fit"
    options = arguments if is_trainer_command else arguments[1:]
    command = "" if arguments[1:] else f"{arguments[0]} {_EXAMPLES.get(arguments[0], '')}"
    return _run(lambda: import_module(module).run(options), lambda: import_module(module), command)


def _find_modules_here() -> None:
    """Let what a user names lie in the working directory, as ``python -m`` does, but for ``python -P``.

    Last of all places, so that a file of the user's that is called like a library does not take its place.
    """
    here = os.getcwd()
    if not sys.flags.safe_path and not {"", here} & set(sys.path):
        sys.path.append(here)


def _run(command: Callable[[], object], load: Callable[[], object] = lambda: None, example: str = "") -> int:
    # `load` is what takes time before the command can begin, `example` a command that works, where this one lacks all.
    from lightning_ssiuu.utils.imports import put_off
    from lightning_ssiuu.utils.termination import TERMINATED, ending_on_sigterm
    from lightning_ssiuu.utils.threads import wait_passively
    from lightning_ssiuu.utils.waiting import held_back

    put_off()
    wait_passively()
    with ending_on_sigterm() as received:
        status = 0
        try:
            with held_back():  # a refusal is one line, without what libraries said before it
                load()
                if not received.is_set():  # some libraries swallow whatever is raised while they are imported
                    with held_back():  # by now there are those who print
                        command()
        except BaseException as error:  # torch.distributed.checkpoint's is no Exception
            if not received.is_set():
                status = _status(error, example)
        if received.is_set():  # whatever it has become on its way
            if not _rank():
                print("lightning-ssiuu: ended by SIGTERM", file=sys.stderr, flush=True)
            return TERMINATED
    return status


def _status(error: BaseException, example: str) -> int:
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED
    if isinstance(error, BrokenPipeError) and _is_unread():
        return _UNREAD
    if isinstance(error, SystemExit):  # --help, or Lightning's way out after an interrupt
        if isinstance(error.__context__, KeyboardInterrupt):
            return _INTERRUPTED
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    from lightning_ssiuu.utils.messages import user_error

    if (mistake := user_error(error)) is None:
        raise error
    return _refuse(f"{mistake}; for example: lightning-ssiuu {example}" if example else str(mistake))


def _is_unread() -> bool:
    """Whether what reads the output has ended (``| head``); then nothing more is written, at the end neither."""
    waiting = select.poll()
    waiting.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in waiting.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _refuse(text: str) -> int:
    if rank := _rank():
        time.sleep(_PATIENCE)
        text = f"rank {rank}: {text}"
    print(f"lightning-ssiuu: error: {text}", file=sys.stderr, flush=True)
    return 2


def _rank() -> int:
    """Number of this process in its run, as far as launchers tell before there is a process group."""
    return next((int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), 0)


if __name__ == "__main__":
    sys.exit(main())
