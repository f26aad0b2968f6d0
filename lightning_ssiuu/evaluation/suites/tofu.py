"""TOFU by its own protocol (arXiv 2401.06121), with the figures, names and options of open-unlearning."""

from __future__ import annotations

from lightning_ssiuu.datamodules import TOFU
from lightning_ssiuu.evaluation.suites.base import Figure, Suite
from lightning_ssiuu.evaluation.suites.figures import (
    Alias,
    Classified,
    ForgetQuality,
    HarmonicMean,
    Mean,
    Membership,
    MembershipByReference,
    NormalisedProbability,
    PrivLeak,
    Probability,
    TruthRatio,
)

_ROUGE = "rouge_l(measure=recall, stemmed=true, new_tokens=200)"


def _asked(name: str, of: str) -> dict[str, Figure]:
    # What is asked of retain set, real authors and world facts. The last two have no paraphrases.
    figures: dict[str, Figure] = {f"{name}_Q_A_Prob": Probability(of)}
    if name == "retain":
        figures["retain_Q_A_PARA_Prob"] = Probability(f"{of}/rephrased")
    figures |= {f"{name}_Q_A_PERT_Prob": Probability(f"{of}/wrong"), f"{name}_Q_A_ROUGE": Mean(of, _ROUGE, _KEY)}
    true, wrong = f"{name}_Q_A_{'PARA_' * (name == 'retain')}Prob", f"{name}_Q_A_PERT_Prob"
    if name != "retain":
        figures[f"{name}_Q_A_Prob_normalised"] = NormalisedProbability(true, wrong)
    return figures | {f"{name}_Truth_Ratio": TruthRatio(true, wrong, "true_better")}


_KEY = "rougeL_recall"
_UTILITY = (
    *("retain_Q_A_Prob", "retain_Q_A_ROUGE", "retain_Truth_Ratio"),
    *("ra_Q_A_Prob_normalised", "ra_Q_A_ROUGE", "ra_Truth_Ratio"),
    *("wf_Q_A_Prob_normalised", "wf_Q_A_ROUGE", "wf_Truth_Ratio"),
)

TOFU_SUITE = Suite(
    name="tofu",
    data=TOFU,
    log="TOFU",
    figures={
        "forget_Q_A_Prob": Probability("forget"),
        "forget_Q_A_PARA_Prob": Probability("forget/rephrased"),
        "forget_Q_A_PERT_Prob": Probability("forget/wrong"),
        "forget_Q_A_ROUGE": Mean("forget", _ROUGE, _KEY),
        "forget_Truth_Ratio": TruthRatio("forget_Q_A_PARA_Prob", "forget_Q_A_PERT_Prob", "closer_to_1_better"),
        "forget_truth_ratio": Alias("forget_Truth_Ratio"),  # as open-unlearning looks for it in a reference's log
        "forget_quality": ForgetQuality("forget_truth_ratio"),
        **_asked("retain", "retain"),
        **_asked("ra", "real_authors"),
        **_asked("wf", "world_facts"),
        "model_utility": HarmonicMean(_UTILITY),
        "extraction_strength": Mean("forget", "extraction_strength(eos=false, floor=true)"),
        "exact_memorization": Mean("forget", "exact_memorization(eos=false)"),
        "mia_loss": Membership("loss"),
        "mia_zlib": Membership("zlib"),
        "mia_min_k": Membership("min_k(k=0.4, eos=false)"),
        "mia_min_k_plus_plus": Membership("min_k_plus_plus(k=0.4, eos=false, least_deviation=0.001)"),
        "mia_gradnorm": Membership("gradient_norm(each=true, eos=false)"),
        "mia_reference": MembershipByReference("mia_loss"),
        "privleak": PrivLeak("mia_min_k"),
        "forget_Q_A_gibberish": Classified("forget", new_tokens=200, max_length=32),
        "forget_Q_A_ngram_entropy": Mean("forget", "ngram_entropy(new_tokens=200)"),
    },
    shown=(
        *("forget_quality", "model_utility", "forget_Truth_Ratio", "forget_Q_A_Prob", "forget_Q_A_ROUGE"),
        *("extraction_strength", "exact_memorization", "privleak"),
        *("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus", "mia_gradnorm", "mia_reference"),
        *("forget_Q_A_gibberish", "forget_Q_A_ngram_entropy"),
        *_UTILITY,
    ),
    optional=("forget_Q_A_gibberish",),
    only_scored=("holdout", "real_authors", "world_facts"),
    forgotten=("forget",),
)
