"""The conditions of penalty_conditions.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ssiuu import DualMask, Muon
from lightning_ssiuu.regularizers import AttributionRegularizer

Which = Literal["negative", "positive", "all", "random half"]


class Controlled(AttributionRegularizer):
    """The penalty on other attributions than negative ones: what of its effect is SSIUU's?"""

    def __init__(self, which: Which, **options: Any) -> None:
        super().__init__(**options)
        self.which, self.generator = which, torch.Generator().manual_seed(0)

    def _penalised(self, attribution: Tensor) -> Tensor:
        if self.which == "positive":
            return torch.gt(attribution, 0).to(attribution.dtype)
        if self.which == "all":
            return torch.ones_like(attribution)
        return torch.randint(2, attribution.shape, generator=self.generator).to(attribution.dtype)


def orthogonal(gradient: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Muon's iteration in float32, as CPUs without arithmetic in bfloat16 are slow in it."""
    a, b, c = coefficients
    x = gradient / gradient.norm().clamp(min=eps)
    wide = x.shape[0] > x.shape[1]
    x = x.T if wide else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if wide else x


#: Optimiser: its class, its options, its learning rate in parts of ``--rate``, and the gradient's largest norm. The
#: rates were chosen by gradient difference's steps and retained score alone, before any attack (Muon's: half of it
#: took 62 steps).
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], float, float | None]] = {
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.0}, 1.0, None),
    "SGD, clipped": (torch.optim.SGD, {}, 500.0, 1.0),
    "signSGD": (torch.optim.Adam, {"betas": (0.0, 0.0), "eps": 1e-15}, 1.0, None),
    "Muon": (Muon, {}, 2.0, None),
}


@dataclass(frozen=True)
class Arm:
    """A condition: optimiser, penalty (options of AttributionRegularizer; None: gradient difference), data, depth."""

    optimizer: str = "AdamW"
    penalty: dict[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    level: float | None = None  # of the forget probability; None: --level
    mask: bool = False  # DualMask without Fisher information instead of a penalty
    which: Which = "negative"
    slower: float = 1.0  # by which the learning rate is divided

    @property
    def control(self) -> Arm:
        """Gradient difference under the same conditions."""
        return Arm(self.optimizer, None, self.data, self.level)

    @property
    def regularizer(self) -> Any:
        """A new one of it, or None."""
        if self.mask:
            return DualMask(alpha=0.0, beta=20.0)
        if self.penalty is None:
            return None
        options = {"weight_mode": "relative", "target": "length_normalised", **self.penalty}
        return AttributionRegularizer(**options) if self.which == "negative" else Controlled(self.which, **options)

    def __str__(self) -> str:
        what = "gradient difference"
        if self.penalty is not None:
            values = {"weight": 1.0, "derivative": "first_order", "target": "length_normalised", "anchor": "previous"}
            shown = {**values, **self.penalty}
            what = f"SSIUU {shown.pop('weight'):g}, " + ", ".join(shown.values())
        what = "mask instead of penalty" if self.mask else what
        extra = [f"{key} {value}" for key, value in self.data.items()]
        extra += [f"level {self.level:g}"] if self.level is not None else []
        extra += [self.which] if self.which != "negative" else []
        extra += [f"rate / {self.slower:g}"] if self.slower != 1 else []
        return ", ".join([self.optimizer, what, *extra])


def penalised(**options: Any) -> dict[str, Any]:
    """Options of the recipe's penalty, at the objective's norm if nothing else is said."""
    return {"weight": 1.0, **options}


EXACT = {"derivative": "exact"}
WHOLE = {"batch_size": 36}  # every step sees the whole forget set: attributions are no mini-batch's
#: By the letters of the hypotheses, in the order in which they are run.
ARMS: dict[str, list[Arm]] = {
    "c": [Arm(penalty=penalised(target=t)) for t in ("log_probability", "sequence", "length_normalised")],
    "a": [
        *(Arm(o, penalised()) for o in ("SGD, clipped", "signSGD", "Muon")),
        Arm("SGD, clipped", penalised(target="log_probability")),
        *(Arm(o, penalised(weight=10.0)) for o in OPTIMIZERS),
    ],
    "b": [
        Arm(penalty=penalised(**EXACT)),
        Arm("SGD, clipped", penalised(**EXACT)),
        *(Arm(penalty=penalised(weight=w, **EXACT)) for w in (3.0, 0.3)),
        Arm(penalty=penalised(anchor="original", **EXACT)),
        Arm(penalty=penalised(target="log_probability", **EXACT)),
        Arm("Muon", penalised(**EXACT)),
    ],
    # With files of --forget whose answers are shorter or longer (answer_lengths.py), beside the same arms without them.
    "d": [
        *(Arm(penalty=penalised(target=t)) for t in ("length_normalised", "sequence")),
        Arm(penalty=penalised(anchor_batch="same", **EXACT)),
    ],
    "h": [Arm(penalty=p, level=2.0) for p in (penalised(), penalised(**EXACT))],
    "e": [Arm(penalty=penalised(anchor_batch="same", **o)) for o in ({}, EXACT)],
    "j": [Arm(mask=True), *(Arm(penalty=penalised(**o), data=WHOLE) for o in ({}, EXACT))],
    "k": [
        *(Arm(penalty=penalised(**EXACT), data=WHOLE, which=w) for w in ("positive", "random half", "all")),
        Arm(data=WHOLE, slower=2.0),
        *(Arm(penalty=penalised(weight=w, **EXACT), data=WHOLE) for w in (0.3, 3.0)),
        Arm(penalty=penalised(weight=10.0), data=WHOLE),
    ],
}
#: Of gradient difference, the recipe's rule and the exact one: stronger and weaker attacks (g), other scores (f).
COMPARED = [Arm(), Arm(penalty=penalised()), Arm(penalty=penalised(**EXACT))]
