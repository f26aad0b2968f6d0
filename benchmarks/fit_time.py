"""Time of our whole ``fit`` command over open-unlearning's whole train command: same model, data, batches and epochs.

    python benchmarks/fit_time.py --peer open-unlearning --peer_python PYTHON [--epochs 10] [--batch 8] [--runs 3]
        [--checkpoint DIR --data forget.jsonl --retain retain.jsonl]

Gradient difference on a small model, in float32 with fused AdamW, each command a process of its own from the start of
Python to the saved model, in turn. Without files the embedded model forgets the embedded facts. ``--peer_python`` is an
interpreter with the peer's requirements.

The peer loads, trains and saves; evaluation, of its defaults, is off (it generates on TOFU's own sets from the hub,
before, between and after epochs), and so are bfloat16, the paged optimiser and TensorBoard. Ours does that, too, and
is run twice: ``bare``, with one score before and after; ``defaults``, with what ``fit`` does beside training unless
told otherwise: it refuses a model that does not know the forget set, scores both sets before and after, looks at the
forget set after every step, attributes to neurons before and after, and draws plots.

Prints one JSON line: processor seconds of the commands and all they start, seconds on the clock, medians of the
pairwise ratios with their range. Unix only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from timing import alternating, ratio

from lightning_ssiuu import Facts
from lightning_ssiuu.models.loading import TINY

ROOT = Path(__file__).parent.parent
#: The peer's pieces of a prompt that make the plain template.
TEMPLATE = {"user_start_tag": "Question: ", "user_end_tag": "\\nAnswer:", "asst_start_tag": " ", "asst_end_tag": ""}
PEER = "the peer"


def timed(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Seconds on the clock and of the processor that a command and its children took.

    Raises:
        RuntimeError: If it fails; its last lines are shown.
    """
    log = folder.with_suffix(".log")
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    if process.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise RuntimeError(f"{command[:3]} ended with {process.returncode}:\n" + "\n".join(last))
    return wall, used.ru_utime + used.ru_stime


def readable(checkpoint: Path, folder: Path) -> Path:
    """A copy whose tokenizer the peer's transformers, an older one, has a class for."""
    shutil.copytree(checkpoint, folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("extra_special_tokens", None)
    file.write_text(json.dumps(settings), encoding="utf-8")
    return folder


def peer_command(options: Any, forget: Path, retain: Path, folder: Path) -> list[str]:
    """Its own training script; settings of its configuration files that need the hub, a GPU or evaluation replaced."""
    arguments = {
        "per_device_train_batch_size": options.batch,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": options.epochs,
        "learning_rate": options.learning_rate,
        "optim": "adamw_torch_fused",
        "bf16": False,
        "bf16_full_eval": False,
        "do_eval": False,
        "eval_on_start": False,
        "eval_strategy": "no",
        "report_to": "none",
    }
    checkpoint = readable(Path(options.checkpoint), folder / "checkpoint")
    settings = {"task_name": "fit_time", "trainer": "GradDiff", "paths.output_dir": folder / "saves"}
    settings |= {f"trainer.args.{name}": value for name, value in arguments.items()}
    settings |= {f"model.template_args.{name}": f'"{text}"' for name, text in TEMPLATE.items()}
    settings |= {
        "model.template_args.apply_chat_template": False,
        "model.template_args.system_prompt_with_special_tokens": "null",
        "model.model_args.pretrained_model_name_or_path": checkpoint,
        "model.model_args.attn_implementation": "sdpa",
        "model.model_args.torch_dtype": "float32",
        "model.tokenizer_args.pretrained_model_name_or_path": checkpoint,
    }
    for part, file in (("forget", forget), ("retain", retain)):
        source = f"data.{part}.TOFU_QA_{part}.args.hf_args"
        settings |= {f"{source}.path": "json", f"{source}.name": "null", f"+{source}.data_files": file}
    listed = [f"{name}={value}" for name, value in settings.items()]
    script = str(options.peer / "src" / "train.py")
    return [options.peer_python, script, "--config-name=unlearn.yaml", "model=Llama-3.2-1B-Instruct", "~eval", *listed]


def our_command(options: Any, forget: Path, retain: Path, folder: Path, bare: bool) -> list[str]:
    """``fit`` on the same; a threshold of 0 % is never met, so that no run stops early."""
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": options.learning_rate, "weight_decay": 0.0}}
    settings: dict[str, Any] = {
        "model": "GradientDifference",
        "model.init_args.checkpoint": options.checkpoint,
        "model.init_args.optimizer": json.dumps(optimizer),
        "data": "CustomData",
        "data.init_args.forget": forget,
        "data.init_args.retain": retain,
        "data.init_args.batch_size": options.batch,
        "stopping.threshold": 0,
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": options.epochs,
        "trainer.default_root_dir": folder / "run",
    }
    if bare:
        settings |= {"model.init_args.scores": "[probability]", "attribution.probe_examples": 0}
        settings |= {"stopping.threshold": "null", "stopping.unknown": "warn"}
    return [
        sys.executable,
        "-m",
        "lightning_ssiuu",
        "fit",
        *(t for k, v in settings.items() for t in (f"--{k}", str(v))),
    ]


def once(name: str, options: Any, forget: Path, retain: Path, work: Path) -> tuple[float, float]:
    """Run one of the commands in an empty folder; seconds on the clock and of the processor."""
    folder = work / name.replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if name == PEER:
        command, path = peer_command(options, forget, retain, folder), str(options.peer / "src")
    else:
        command, path = our_command(options, forget, retain, folder, "bare" in name), str(ROOT)
    environment = {"PYTHONPATH": path, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    return timed(command, folder, environment)


def write_questions(folder: Path) -> tuple[Path, Path]:
    """The embedded facts as two question files."""
    splits, files = Facts().splits, []
    for name in ("forget", "retain"):
        rows = [{"question": one.question, "answer": one.answer} for one in getattr(splits, name)]
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files[0], files[1]


def main() -> None:
    """Run the commands in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="a checkout of open-unlearning; without one ours alone are timed")
    parser.add_argument("--peer_python", help="an interpreter with its requirements")
    parser.add_argument("--checkpoint", default=str(TINY), help="a directory that both can load")
    parser.add_argument("--data", type=Path, help="forget set: question and answer, JSON Lines")
    parser.add_argument("--retain", type=Path, help="retain set, the same")
    parser.add_argument("--batch", type=int, default=8, help="forget sequences, and as many retain sequences")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    if (options.peer is None) != (options.peer_python is None) or (options.data is None) != (options.retain is None):
        parser.error("--peer and --peer_python go together, and so do --data and --retain")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        forget, retain = (options.data, options.retain) if options.data is not None else write_questions(work)
        if options.peer is not None:
            options.peer = options.peer.resolve()
        names = ["ours, bare", "ours, defaults", *([PEER] if options.peer is not None else [])]
        runs = {name: partial(once, name, options, forget.resolve(), retain.resolve(), work) for name in names}
        times = alternating(runs, options.runs, warm_up=0)
    found: dict[str, Any] = {"checkpoint": options.checkpoint, "epochs": options.epochs, "batch": options.batch}
    for number, clock in ((1, "processor"), (0, "wall")):
        each = {name: [pair[number] for pair in pairs] for name, pairs in times.items()}
        found[clock] = {"seconds": {name: round(statistics.median(values), 2) for name, values in each.items()}}
        if PEER in each:
            found[clock]["over the peer"] = {name: ratio(each[name], each[PEER]) for name in names if name != PEER}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
