"""The suites of MUSE, WMDP, RWKU, KnowUnDo and LUME, each by its own protocol (docs/how-to/suites.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean
from typing import ClassVar

from lightning_ssiuu.datamodules import LUME, MUSE, RWKU, WMDP, KnowUnDo, WMDPDeduped
from lightning_ssiuu.datamodules.rwku import PROBES
from lightning_ssiuu.datamodules.wmdp_deduped import PARTS
from lightning_ssiuu.evaluation.suites import texts
from lightning_ssiuu.evaluation.suites.base import Figure, Suite
from lightning_ssiuu.evaluation.suites.figures import HarmonicMean, Made, Mean, Membership, PrivLeak, percent


@dataclass(frozen=True)
class RetrainedPrivLeak(PrivLeak):
    """As :class:`PrivLeak`, and nothing without a reference: it is defined against a retrained model."""

    needs_reference: ClassVar[bool] = True


def _text(name: str) -> str:
    return f"{texts.__name__}.{name}"


def _complement(value: float) -> float:
    return 1 - value


MUSE_SUITE = Suite(
    name="muse",
    data=MUSE,
    figures={
        "verbmem_f": percent("verbmem", _text("MUSE_VERBMEM")),
        "knowmem_f": percent("forget_qa", _text("MUSE_KNOWMEM")),
        "knowmem_r": percent("retain_qa", _text("MUSE_KNOWMEM")),
        "mia_min_k": Membership("min_k(k=0.4)", "mia_forget", "mia_holdout"),
        "privleak": RetrainedPrivLeak("mia_min_k"),
        "verbmem_f_stemmed": percent("verbmem", _text("MUSE_VERBMEM_STEMMED")),
        "knowmem_f_stemmed": percent("forget_qa", _text("MUSE_KNOWMEM_STEMMED")),
        "knowmem_r_stemmed": percent("retain_qa", _text("MUSE_KNOWMEM_STEMMED")),
    },
    optional=("verbmem_f_stemmed", "knowmem_f_stemmed", "knowmem_r_stemmed"),
    renders=True,
    only_scored=("forget_qa", "retain_qa", "mia_holdout"),
    forgotten=("mia_forget",),
)

WMDP_SUITE = Suite(
    name="wmdp",
    data=WMDP,
    figures={"wmdp": percent("items", "multiple_choice"), "mmlu": percent("mmlu", "multiple_choice")},
    renders=True,
    only_scored=("items", "mmlu"),
)

WMDP_DEDUPED_SUITE = Suite(
    name="wmdp_deduped",
    data=WMDPDeduped,
    figures={
        **{f"part_{n}": percent(f"part_{n}", "multiple_choice") for n in range(PARTS)},
        "forget": Made(tuple(f"part_{n}" for n in range(PARTS)), lambda *parts: mean(parts)),
        "retain": percent("kept", "multiple_choice"),
    },
    renders=True,
    only_scored=(*(f"part_{n}" for n in range(PARTS)), "kept"),
)

RWKU_SUITE = Suite(
    name="rwku",
    data=RWKU,
    figures={
        **{name: percent(name, _text("RWKU_RECALL")) for name in PROBES},
        **{
            f"{of}_{signal}": Mean(of, name)
            for of in ("mia_forget", "mia_retain")
            for signal, name in (("loss", "loss"), ("zlib", "zlib"), ("min_k_plus_plus", "min_k_plus_plus(k=0.2)"))
        },
    },
    renders=True,
    only_scored=PROBES,
)


def _accuracy_of(split: str, success: str) -> dict[str, Figure]:
    accuracy = f"{split}_accuracy"
    worth: dict[str, Figure] = {success: Made((accuracy,), lambda value: 100 - value if split == "unlearn" else value)}
    return {
        accuracy: percent(f"{split}_val", "exact_memorization"),
        **worth,
        f"{split}_log_likelihood": Mean(f"{split}_val", "loss"),
        f"{split}_perplexity": Made((f"{split}_log_likelihood",), lambda value: math.exp(-value)),
    }


KNOWUNDO_SUITE = Suite(
    name="knowundo",
    data=KnowUnDo,
    figures={**_accuracy_of("unlearn", "unlearn_success"), **_accuracy_of("retention", "retention_success")},
    shown=("unlearn_success", "retention_success", "unlearn_perplexity", "retention_perplexity"),
    renders=True,
    only_scored=("unlearn_val", "retention_val"),
)

_TASKS = ("Task1", "Task2", "Task3")
_ASKED = {"regurgitation": _text("LUME_REGURGITATION"), "knowledge": _text("LUME_KNOWLEDGE")}
_LUME = {f"{s}_{task}_{kind}": kind for s in ("forget", "retain") for task in _TASKS for kind in _ASKED}
_INVERTED = {f"not_{name}": Made((name,), _complement) for name in _LUME if name.startswith("forget")}

LUME_SUITE = Suite(
    name="lume",
    data=LUME,
    figures={
        **{name: Mean(name, _ASKED[kind]) for name, kind in _LUME.items()},
        **_INVERTED,
        "task_aggregate": HarmonicMean((*_INVERTED, *(name for name in _LUME if name.startswith("retain")))),
        "mia_loss": Membership("loss", "member", "nonmember"),
        "mia_score": Made(("mia_loss",), lambda auc: 1 - 2 * abs(auc - 0.5)),
    },
    shown=("task_aggregate", "mia_score", *_LUME),
    renders=True,
    only_scored=("nonmember",),
)
