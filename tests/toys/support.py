"""Which objective refuses which option, and the columns of docs/reference/features.md, which this file writes anew."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from lightning_ssiuu.models.lora import LoRA
from lightning_ssiuu.objectives import objectives
from lightning_ssiuu.objectives.ssiuu import SSIUU
from lightning_ssiuu.utils.errors import UserError

FEATURES = Path(__file__).parents[2] / "docs" / "reference" / "features.md"
SCRIPT = "tests/toys/support.py"
NAN, INF = math.nan, math.inf
#: By option the arguments that ask for it, and the objectives that refuse it: these, and no others.
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"lora": LoRA(r=2)},
    "quantization": {"lora": LoRA(r=2), "quantization": "4bit"},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "retain_weight": {"retain_weight": 0.0},
    "retain": {"retain": "kl"},
    "reference": {"reference": "second_model"},
}
REFUSES: dict[str, set[str]] = {
    "lora": {"CIR", "KLUE", "MCU", "RepSelect", "UNDO"},
    "quantization": {"CIR", "KLUE", "MCU", "RepSelect", "UNDO"},
    "gradient_checkpointing": {"CIR", "LAT", "MCU"},
    "retain_weight": {"GRU", "MUDMAN", "UNDO"},
    "retain": {"PDU", "RMU", "UNDO"},
    "reference": set(),
    "backbone": {
        *(
            "AdversarialUnlearning",
            "CIR",
            "ElicitedUnlearning",
            "FDCU",
            "GRU",
            "KLUE",
            "LAT",
            "MCU",
            "MUDMAN",
            "PDU",
            "RepSelect",
        ),
        *("SAM", "SSIUU", "TaskVector", "UNDO"),
    },
}
#: Values out of the range of objectives' own options.
BAD_OPTIONS: list[tuple[str, str, list[Any]]] = [
    ("AdversarialUnlearning", "steps", [-1]),
    ("AdversarialUnlearning", "step_size", [-1.0, NAN]),
    ("AdversarialUnlearning", "floor", [100.0, -1.0, "oracle"]),
    ("AdversarialUnlearning", "adversary", ["adam"]),
    ("AdversarialUnlearning", "adversary_share", [0.0, 1.0]),
    ("AdversarialUnlearning", "adversary_neurons", [0.0, 101.0]),
    ("AltPO", "beta", [0.0, -1.0, NAN, INF]),
    ("CEU", "skip_first", [-1, 0.5]),
    ("CIR", "input_components", [-1]),
    ("CIR", "gradient_components", [-1]),
    ("CIR", "every_n_epochs", [0]),
    ("DPO", "beta", [0.0, -1.0, NAN, INF]),
    ("DPO", "rejections", [[], ["I pass.", " "]]),
    ("ElicitedUnlearning", "adversary_lr", [-1.0, NAN]),
    ("ElicitedUnlearning", "fork_every_n_steps", [0]),
    ("ElicitedUnlearning", "adversary_share", [0.0, 1.0]),
    ("ElicitedUnlearning", "full_strength", [-0.1, 1.1]),
    ("ElicitedUnlearning", "floor", [100.0, -1.0, "oracle"]),
    ("ElicitedUnlearning", "mismatched_weight", [-1.0, INF]),
    ("FDCU", "regularizer.alpha", [-1.0, NAN]),
    ("FDCU", "regularizer.beta", [-1.0, INF]),
    ("FDCU", "regularizer.n_examples", [0]),
    ("FDCU", "regularizer.normalise", ["sum"]),
    ("FLAT", "divergence", ["hellinger"]),
    ("FLAT", "rejections", [[], ["I pass.", " "]]),
    ("GRU", "smoothing", [0.0, 1.1, NAN]),
    ("IDK", "rejections", [[], ["I pass.", " "]]),
    ("KLUE", "share", [0.0, 1.1]),
    ("KLUE", "regularization", [-1.0]),
    ("KLUE", "mismatched", [0]),
    ("LAT", "epsilon", [-0.1, NAN]),
    ("LAT", "steps", [-1]),
    ("LAT", "step_size", [-0.1, INF]),
    ("LAT", "layers", [[], [-1]]),
    ("MCU", "output_components", [-1]),
    ("MCU", "input_components", [-1]),
    ("MCU", "gradient_components", [-1]),
    ("MCU", "floor", [-0.1, NAN]),
    ("MCU", "layers", [[], [-1]]),
    ("MCU", "every_n_epochs", [0]),
    ("MUDMAN", "fork_every_n_steps", [0]),
    ("MUDMAN", "adversary_lr", [-1.0, INF]),
    ("MUDMAN", "retain_momentum", [-0.1, 1.0]),
    ("NPO", "beta", [0.0, -1.0, NAN, INF]),
    ("PDU", "epsilon", [0.0, NAN]),
    ("PDU", "tolerance", [-0.1]),
    ("PDU", "dual_step_size", [-1.0, NAN]),
    ("PDU", "dual_warmup_epochs", [-1]),
    ("RepSelect", "components", [-1]),
    ("RepSelect", "adversary_lr", [-1.0, NAN]),
    ("RepSelect", "adversary_rank", [0]),
    ("RepSelect", "adversary_epochs", [0]),
    ("RepSelect", "adversary_batch_size", [0]),
    ("RepSelect", "directions", ["both"]),
    ("RMU", "coefficient", [0.0, NAN]),
    ("RMU", "layers_to_train", [0]),
    ("SAM", "rho", [-0.1, NAN]),
    ("SatImp", "beta1", [-0.5, NAN]),
    ("SatImp", "beta2", [-1.0, INF]),
    ("SelectiveUnlearning", "shots", [-1]),
    ("SelectiveUnlearning", "margin", [-1.0, NAN]),
    ("SelectiveUnlearning", "held_weight", [-1.0, INF]),
    ("SimNPO", "beta", [0.0, -1.0, NAN, INF]),
    ("SimNPO", "delta", [-1.0]),
    ("TaskVector", "alpha", [0.0, -1.0, INF]),
    ("UNDIAL", "beta", [-1.0, NAN, INF]),
    ("UNDO", "alpha", [-0.1, 1.1, NAN]),
    ("UNDO", "beta", [-1.0]),
    ("UNDO", "forget_weight", [1.0]),
    ("WGA", "beta", [-1.0, NAN, INF]),
]
#: Options without a range, or with one that only the model tells.
ANY_VALUE = {
    "AdversarialUnlearning": {"seed"},
    "AltPO": {"seed"},
    "CIR": {"attention"},
    "ElicitedUnlearning": {"seed"},
    "KLUE": {"only_unforgotten", "seed"},
    "RepSelect": {"seed"},
    "RMU": {"layer", "seed"},
    "SelectiveUnlearning": {"seed", "unaware"},
    "UNDO": {"seed"},
}


def refusal(name: str, option: str) -> UserError | None:
    """What an objective says to an option, or to being a backbone; None if it takes it."""
    try:
        if option == "backbone":
            SSIUU(backbone=objectives()[name]())
        else:
            objectives()[name](**OPTIONS[option])
    except UserError as error:
        return error
    return None


def with_support(text: str) -> str:
    """The text of docs/reference/features.md, its last two columns of the objectives as ``REFUSES`` has them."""

    def row(found: re.Match[str]) -> str:
        name, begin = found["name"], found["begin"]
        adapters = name not in REFUSES["lora"] | REFUSES["quantization"]
        lends = name not in REFUSES["backbone"]
        return f"{begin} {'yes' if adapters else 'no'} | {'yes' if lends else 'no'} |"

    names = "|".join(objectives())
    return re.sub(rf"(?m)^(?P<begin>\| `(?P<name>{names})`[^|]*\|[^|]*\|)[^|\n]*\|[^|\n]*\|$", row, text)


if __name__ == "__main__":
    FEATURES.write_text(with_support(FEATURES.read_text(encoding="utf-8")), encoding="utf-8")
