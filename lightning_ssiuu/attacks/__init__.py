"""Attacks on saved models: those that fine-tune, and those that leave the weights as they are."""

from lightning_ssiuu.attacks.ablation import Ablation
from lightning_ssiuu.attacks.attackers import Attacker
from lightning_ssiuu.attacks.base import Attack
from lightning_ssiuu.attacks.benign import Benign
from lightning_ssiuu.attacks.embedding_attack import EmbeddingAttack
from lightning_ssiuu.attacks.few_shot import FewShot
from lightning_ssiuu.attacks.harmful import Harmful
from lightning_ssiuu.attacks.held_out import HeldOutFacts
from lightning_ssiuu.attacks.interpolation import Interpolation
from lightning_ssiuu.attacks.jailbreak import Jailbreak
from lightning_ssiuu.attacks.layer_probes import LayerProbes
from lightning_ssiuu.attacks.multi_turn import MultiTurn
from lightning_ssiuu.attacks.paraphrase import Paraphrase
from lightning_ssiuu.attacks.prefill import Prefill
from lightning_ssiuu.attacks.quantization import Quantization
from lightning_ssiuu.attacks.relearning import Relearning
from lightning_ssiuu.attacks.sampling import Sampling
from lightning_ssiuu.attacks.soft_prompt import SoftPrompt
from lightning_ssiuu.attacks.suffix_search import SuffixSearch
from lightning_ssiuu.attacks.translation import Translation
from lightning_ssiuu.attacks.unlearning_depth import UnlearningDepth

__all__ = [
    "Ablation",
    "Attack",
    "Attacker",
    "Benign",
    "EmbeddingAttack",
    "FewShot",
    "Harmful",
    "HeldOutFacts",
    "Interpolation",
    "Jailbreak",
    "LayerProbes",
    "MultiTurn",
    "Paraphrase",
    "Prefill",
    "Quantization",
    "Relearning",
    "Sampling",
    "SoftPrompt",
    "SuffixSearch",
    "Translation",
    "UnlearningDepth",
]
