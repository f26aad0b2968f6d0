"""FaithUn's suite (arXiv 2502.19207): accuracy among three options on each kind of question, forget and test set."""

from __future__ import annotations

from statistics import mean

from lightning_ssiuu.datamodules import FaithUn
from lightning_ssiuu.evaluation.suites.base import Suite
from lightning_ssiuu.evaluation.suites.figures import Alias, Made, percent

_SCORE = "choice_likelihood"
#: Sets that are no one's training data, by the names of :meth:`FaithUn.named_set`.
_ASKED = ("test", "forget_hop1_test", "forget_hop2_test", "forget_same_object", "test_hop2_test")

FAITHUN_SUITE = Suite(
    name="faithun",
    data=FaithUn,
    figures={
        "UA": percent("forget", _SCORE),
        "UA_paraphrased": percent("forget_hop1_test", _SCORE),
        "TA": percent("test", _SCORE),
        "SA": percent("forget_same_object", _SCORE),
        "MA_f": percent("forget_hop2_test", _SCORE),
        "MA_t": percent("test_hop2_test", _SCORE),
        "MA": Made(("MA_f", "MA_t"), lambda forget, test: mean((100 - forget, test))),
        "Score": Made(("UA_paraphrased", "TA", "SA", "MA"), lambda forget, *others: mean((100 - forget, *others))),
        "FS": Alias("UA"),
        "RS": Alias("TA"),
    },
    optional=("MA", "Score", "FS", "RS"),
    only_scored=_ASKED,
)
