"""What the verdict of an audit rests on: the floor of the forget score, relearning, and undoing the flagged neurons."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng

from lightning_ssiuu.attacks.ablation import Neuron, Recording, control_neurons, output_columns, patched
from lightning_ssiuu.attacks.base import Target, forget_score
from lightning_ssiuu.attacks.curves import highest_beside, spread
from lightning_ssiuu.attacks.determined import kept_curves
from lightning_ssiuu.attacks.harmful import Harmful
from lightning_ssiuu.attacks.records import read_attacks
from lightning_ssiuu.attribution.influence import SpuriousNeuron
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.evaluation.runs import run_of
from lightning_ssiuu.models.architectures import NeuronSite
from lightning_ssiuu.reports.audit.verdict import Evidence, Forgetting, Share, share_above_controls, share_of_seeds
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.console import progress
from lightning_ssiuu.utils.errors import UserError

#: Draws of random neurons that flagged ones are compared with.
DRAWS = 5
#: Of many flagged neurons this many are also undone alone: undoing hundreds breaks any model.
FEW = 10


@dataclass(frozen=True)
class RelearningProbe:
    """The small harmful attack that ``audit`` makes where the run was not attacked.

    Args:
        p: Attacked fraction of the forget set; the disjoint rest is scored.
        learning_rates: AdamW's. The default suits small models; the paper's for 3 B parameters is 1e-5, 5e-6, 1e-6.
        seeds: Seeds of the selection and the order; at least two for a spread.
        epochs: Passes over the attack set.
        batch_size: Attack sequences per step, over all devices.
    """

    p: float = 0.2
    learning_rates: Sequence[float] = (3e-4, 1e-3)
    seeds: Sequence[int] = (0, 1, 2)
    epochs: int = 5
    batch_size: int = 8

    def __post_init__(self) -> None:
        self.attack()

    def attack(self) -> Harmful:
        with _named_probe():
            return Harmful(**(asdict(self) | {"p": [self.p]}))

    def check(self, data: UnlearningDataModule, score: str, devices: Devices) -> None:
        with _named_probe():
            self.attack().check(data, score, devices)


@contextmanager
def _named_probe() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(error.argument.replace("attack.", "probe."), error.value, error.allowed) from error


def recorded_relearning(unlearned: str, score: str | None, oracle: bool) -> dict[str, Any] | None:
    """The relearning attacks in the run's ``attack.json``: ``{"source", "score", "attacks", "curves"}``, or None.

    Only attacks with this score (None: that of the first) count and, where asked for, those that have the oracle's.
    """
    if (run := run_of(unlearned)) is None:
        return None
    content = read_attacks(run, "unlearned")
    rows = [
        row
        for row in content["attacks"]
        if row["n_attack"] is not None  # of what trains nothing there is none
        and row.get("score") == (score or row.get("score"))
        and ("oracle" in row or not oracle)
    ]
    rows = [row for row in rows if row["score"] == rows[0]["score"]]
    if not rows:
        return None
    kept = {(row["attack"], row["p"]) for row in rows}
    curves = [curve for curve in content["curves"] if (curve["attack"], curve["p"]) in kept]
    return {"source": "attack.json", "score": rows[0]["score"], "attacks": rows, "curves": curves}


def probe_relearning(
    models: Mapping[str, str],
    data: UnlearningDataModule,
    probe: RelearningProbe,
    score: str,
    devices: Devices,
    control: UnlearningDataModule | None = None,
    keep_oracle: bool = False,
) -> dict[str, Any]:
    """Attack the models in turn, only one in memory; as :func:`recorded_relearning`, with the probe's options.

    With ``control``, the unlearned model also on the invented facts in its place of the forget set. ``keep_oracle``
    takes the oracle's curves from the cache, or puts them there (:func:`~.attacks.determined.kept_curves`).
    """
    attack = probe.attack()
    targets = [Target(*model, devices) for model in models.items()]
    if control is not None:
        targets.append(Target("control", models["unlearned"], devices, control))
    kept = [target for target in targets if keep_oracle and target.name == "oracle"]
    with _seed_kept(), _named_probe():
        curves = attack.run([target for target in targets if target not in kept], data, score, devices)
        for target in kept:
            curves += attack.run([target], data, score, devices, kept_curves(attack, target, data, score, devices))
    gc.collect()  # the last model, before the next one is loaded
    options = asdict(probe) | {"learning_rates": list(probe.learning_rates), "seeds": list(probe.seeds)}
    content = {"source": "probe", "score": score, "options": options, "attacks": attack.rows(curves, score)}
    return content | {"curves": [{"attack": attack.name, **asdict(curve)} for curve in curves]}


@contextmanager
def _seed_kept() -> Iterator[None]:
    # An attack seeds everything; the audit's own seed, and who draws after it, are not to notice.
    names = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    before = {name: os.environ.pop(name, None) for name in names}
    try:
        with isolate_rng():
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def relearning_evidence(rows: Sequence[Mapping[str, Any]], forgetting: Forgetting) -> list[Evidence]:
    """The share of what was lost that each attack brings back, seed by seed.

    ``(highest − reference) / (original − reference)``, where the reference is the oracle's highest score under the same
    attack, else the control's on facts that nobody was ever taught (:func:`~.attacks.curves.highest_beside`), else the
    floor, and in any case no less than the score before the attack: what was not lost cannot return.
    """
    evidence = []
    for row in rows:
        unlearned, beside = row["unlearned"], highest_beside(row)
        highest, before = unlearned["forget_score"]["per_seed"], unlearned["before"]["per_seed"]
        others = beside or [forgetting.floor] * len(highest)
        if row.get("n_attack") == 1:  # of few items two seeds may choose the same one: the same run twice is no spread
            runs: dict[tuple[float, float], float] = {}
            for high, low, other in zip(highest, before, others, strict=True):
                runs[high, low] = min(other, runs.get((high, low), other))
            others, (highest, before) = list(runs.values()), zip(*runs, strict=True)
        references = [max(pair) for pair in zip(before, others, strict=True)]
        lost = [forgetting.original - reference for reference in references]
        # Where the attack leaves nothing to come back, nothing can be said of how much did.
        share = Share(math.nan, -math.inf, math.inf, len(highest))
        if min(lost) > 0:
            came = [high - reference for high, reference in zip(highest, references, strict=True)]
            share = share_of_seeds([part / whole for part, whole in zip(came, lost, strict=True)])
        name = row["attack"].replace("_", " ")
        size = "" if row["p"] is None else f" {100 * row['p']:g} %"
        what = f"the {name} relearning attack" + (f" with{size} of the forget set" if size else "")
        beyond = "invented facts under the same attack" if beside else "the score before it"
        beyond = "the oracle under the same attack" if "oracle" in row else beyond
        inside = unlearned.get("inside_grid", True)
        note = "" if inside else "a lower bound: the highest score lies at the edge of the grid"
        evidence.append(Evidence("relearning", f"relearning, {name}{size}", what, share, beyond, note))
    return evidence


def undo_neurons(
    original: str,
    unlearned: str,
    sites: Sequence[NeuronSite],
    flags: Mapping[str, Sequence[SpuriousNeuron]],
    data: UnlearningDataModule,
    score: str,
    before: float,
    devices: Devices,
) -> dict[str, Any]:
    """Put flagged neurons back to what they were before unlearning, and to zero, beside as many random ones.

    ``flags`` are the flagged neurons by what flagged them, the worst first; all of them are undone, and the first
    :data:`FEW` alone. Scored is a teacher-forced ``score`` of the forget set, ``before`` what it is with none undone
    (percent). A row of ``{"score", "rows"}`` has ``flags``, ``which`` (``"all"``, ``"worst"``), ``variant``
    (``"original"``, ``"zero"``), ``n_neurons``, ``before``, ``forget_score`` (percent) and ``control``, the spread over
    :data:`DRAWS` draws.
    """
    sets: dict[tuple[str, str], list[list[Neuron]]] = {}
    for name, flagged in flags.items():
        neurons: list[Neuron] = [(neuron.layer, neuron.module, neuron.index) for neuron in flagged]
        for which, chosen in (("worst", neurons[:FEW]), ("all", neurons)):
            if chosen and (which == "all" or len(neurons) > FEW):
                sets[name, which] = [chosen, *(control_neurons(sites, chosen, draw) for draw in range(DRAWS))]
    rows: list[dict[str, Any]] = []
    if sets:
        everything = [neuron for draws in sets.values() for drawn in draws for neuron in drawn]
        recording = Recording(output_columns(sites, everything))
        model, tokenizer = Target("original", original, devices).load()
        with recording.of(model.hf):
            forget_score(model, tokenizer, data, score)
        del model
        model, tokenizer = Target("unlearned", unlearned, devices).load()
        cells = [(variant, *flagged) for variant in ("original", "zero") for flagged in sets.items()]
        for variant, (name, which), draws in progress(cells, "undoing neurons"):
            values = recording if variant == "original" else None
            scores = []
            for drawn in draws:
                with patched(model.hf, output_columns(sites, drawn), values):
                    scores.append(forget_score(model, tokenizer, data, score))
            row = {"flags": name, "which": which, "variant": variant, "n_neurons": len(draws[0]), "before": before}
            rows.append(row | {"forget_score": scores[0], "control": spread(scores[1:])})
    return {"score": score, "rows": rows}


def neuron_evidence(ablation: Mapping[str, Any], original: float) -> list[Evidence]:
    """The share of what was lost that comes back with the flagged neurons at zero, beyond as many random ones.

    Only zero counts: it adds nothing that the unlearned model does not hold itself. The activations from before
    unlearning carry the answers with them, and bring some back even in a model that never saw them. ``original`` is
    that model's forget score, in percent.
    """
    evidence = []
    for row in ablation["rows"]:
        if row["variant"] != "zero" or (lost := original - row["before"]) <= 0:
            continue
        scores = (row["forget_score"], *row["control"]["per_seed"])
        restored, *controls = ((score - row["before"]) / lost for score in scores)
        n, which, flags = row["n_neurons"], row["which"], row["flags"]
        what = f"setting {'all' if which == 'all' else 'the worst'} {n} neurons flagged by {flags} to zero"
        share = share_above_controls(restored, controls)
        evidence.append(Evidence("neurons", f"{which} {n} by {flags} to zero", what, share, "as many random neurons"))
    return evidence
