"""Where the processor time of an attack and of an audit goes, stage by stage, and beside another checkout.

    python benchmarks/stages.py attack --checkpoint DIR --forget FILE --retain FILE [--p 0.1 0.3] [--beside CHECKOUT]
    python benchmarks/stages.py audit --checkpoint DIR --forget FILE --retain FILE --distractors perturbed_answer

Without files, the embedded facts. ``attack`` makes one run of ``--epochs`` epochs for every p, and says by arithmetic
what a full attack takes (3 learning rates, 3 seeds, 10 epochs): all runs with one p cost the same. ``audit`` compares
the checkpoint with ``--unlearned``, by default the same weights with noise, which hides and erases nothing: no attack,
and no neurons are undone. Every figure is processor time in seconds, the median over ``--repeats`` with its range, one
process each; ``--beside`` runs this script on the package of another checkout in turn, and gives the ratio.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from timing import markdown

#: Functions by the stage that their time counts to; what they call has stages of its own.
STAGES = {
    "loading": ("lightning_ssiuu.training.devices.load_model",),
    "scoring": ("lightning_ssiuu.attacks.finetune.evaluate", "lightning_ssiuu.attribution.diagnosis.evaluate"),
    "training": ("lightning.pytorch.loops.optimization.automatic._AutomaticOptimization.run",),
    "restoring": ("lightning_ssiuu.attacks.finetune.Snapshot.restore",),
    "attributions": ("lightning_ssiuu.attribution.diagnosis.attributions",),
    "own change": ("lightning_ssiuu.reports.audit.measure.own_change",),
    "logit lens": ("lightning_ssiuu.reports.audit.measure.answer_lens",),
    "level by chance": tuple(f"lightning_ssiuu.reports.audit.measure.{n}" for n in ("chance_of", "knowledge")),
    "undoing": ("lightning_ssiuu.cli.audit.undo_neurons",),
    "relearning": ("lightning_ssiuu.cli.audit.probe_relearning",),
    "pages and plots": ("lightning_ssiuu.cli.audit._write",),
}
SEEDS, RATES, EPOCHS = 3, 3, 10


class Clock:
    """Processor time by stage, without that of stages inside."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside: list[float] = []

    def watch(self, path: str, stage: str) -> None:
        """Count a function's time to a stage."""
        owner_path, _, name = path.rpartition(".")
        try:
            owner: Any = importlib.import_module(owner_path)
        except ModuleNotFoundError:  # a class
            module, _, cls = owner_path.rpartition(".")
            owner = getattr(importlib.import_module(module), cls)
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                taken, inside = time.process_time() - begin, self._inside.pop()
                self.seconds[stage] += taken - inside
                if self._inside:
                    self._inside[-1] += taken

        setattr(owner, name, timed)


def data_of(options: argparse.Namespace) -> Any:
    """The data module."""
    from lightning_ssiuu import CustomData, Facts

    if options.forget is None:
        return Facts(tokenizer=options.checkpoint)
    columns = {} if options.distractors is None else {"distractors_column": options.distractors}
    return CustomData(
        options.forget, options.retain, tokenizer=options.checkpoint, template=options.template, **columns
    )


def with_noise(checkpoint: str, folder: str) -> str:
    """A copy of a model whose projections all differ a little."""
    import torch

    from lightning_ssiuu.models.loading import load_model, load_tokenizer

    model = load_model(checkpoint)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data += 1e-3 * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    load_tokenizer(checkpoint).save_pretrained(folder)
    return folder


def once(options: argparse.Namespace) -> dict[str, float]:
    """Stages of one attack or audit, in this process."""
    from lightning_ssiuu.attacks import Harmful
    from lightning_ssiuu.cli.attack import attack
    from lightning_ssiuu.cli.audit import audit
    from lightning_ssiuu.training.devices import Devices

    clock, found, devices = Clock(), dict[str, float](), Devices(options.accelerator)
    for stage, paths in STAGES.items():
        for path in paths:
            clock.watch(path, stage)
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "audit":
            unlearned = options.unlearned or with_noise(options.checkpoint, f"{folder}/noise")
            clock.seconds.clear()
            begin = time.process_time()
            given: dict[str, Any] = {"probe_examples": options.probe_examples, "output": folder, "devices": devices}
            audit(options.checkpoint, unlearned, data=data_of(options), score=options.score, **given)
            found = dict(clock.seconds)
            found["everything else"] = time.process_time() - begin - sum(found.values())
        else:
            full = 0.0
            for p in options.p:
                clock.seconds.clear()
                method = Harmful(p=[p], seeds=[0], learning_rates=[1e-5], epochs=options.epochs)
                given = {"output": f"{folder}/{p}", "devices": devices}
                attack(options.checkpoint, attack=method, data=data_of(options), score=options.score, **given)
                seconds = clock.seconds
                found |= {f"{stage}, p {p}": taken for stage, taken in seconds.items() if stage != "loading"}
                score, epoch = seconds["scoring"] / (options.epochs + 1), seconds["training"] / options.epochs
                full += SEEDS * score + SEEDS * RATES * (EPOCHS * (epoch + score) + seconds["restoring"])
            found["a full attack, by arithmetic"] = full
    return found


def elsewhere(options: argparse.Namespace, checkout: Path) -> dict[str, float]:
    """The same on the package of a checkout, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--once"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["attack", "audit"])
    parser.add_argument("--checkpoint", default="tiny", help="attacked; for audit the model before unlearning")
    parser.add_argument("--unlearned", help="for audit; by default the checkpoint with noise")
    parser.add_argument("--forget", help="questions and answers; by default the embedded facts")
    parser.add_argument("--retain", help="the same")
    parser.add_argument("--distractors", help="their column in both files")
    parser.add_argument("--template", default="plain")
    parser.add_argument("--score", default="probability")
    parser.add_argument("--p", type=float, nargs="+", default=[0.1, 0.3], help="attacked fractions")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--probe_examples", type=int, default=64)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--beside", type=Path, help="another checkout of this repository")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(once(options)))
        return
    own = Path(__file__).resolve().parent.parent
    checkouts = {"this": own} | ({} if options.beside is None else {"beside": options.beside})
    found: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for _ in range(options.repeats):
        for name, checkout in checkouts.items():
            found[name].append(elsewhere(options, checkout))
    rows = []
    for stage in (*found["this"][0], *(["all"] if options.what == "audit" else [])):
        taken = {
            name: [one.get(stage, 0.0) if stage != "all" else sum(one.values()) for one in each]
            for name, each in found.items()
        }
        cells = [f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})" for each in taken.values()]
        if options.beside is not None:
            ratios = [ours / theirs for ours, theirs in zip(*taken.values(), strict=True) if theirs]
            cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
        rows.append([stage, *cells])
    print(markdown(["stage", *(f"{name}, s" for name in checkouts), *(["ratio"] if options.beside else [])], rows))


if __name__ == "__main__":
    main()
