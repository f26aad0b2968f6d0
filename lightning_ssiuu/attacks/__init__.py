"""Attacks on saved models: those that fine-tune, and those that train nothing."""

from lightning_ssiuu.attacks.ablation import Ablation
from lightning_ssiuu.attacks.attackers import Attacker
from lightning_ssiuu.attacks.base import Attack
from lightning_ssiuu.attacks.benign import Benign
from lightning_ssiuu.attacks.harmful import Harmful
from lightning_ssiuu.attacks.held_out import HeldOutFacts
from lightning_ssiuu.attacks.interpolation import Interpolation
from lightning_ssiuu.attacks.paraphrase import Paraphrase
from lightning_ssiuu.attacks.quantization import Quantization
from lightning_ssiuu.attacks.relearning import Relearning
from lightning_ssiuu.attacks.sampling import Sampling

__all__ = [
    "Ablation",
    "Attack",
    "Attacker",
    "Benign",
    "Harmful",
    "HeldOutFacts",
    "Interpolation",
    "Paraphrase",
    "Quantization",
    "Relearning",
    "Sampling",
]
