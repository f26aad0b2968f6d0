"""Suites by name: what is scored of a benchmark, by its own protocol, and which figures are made of it."""

from lightning_ssiuu.evaluation.suites.base import Suite
from lightning_ssiuu.evaluation.suites.faithun import FAITHUN_SUITE
from lightning_ssiuu.evaluation.suites.published import (
    KNOWUNDO_SUITE,
    LUME_SUITE,
    MUSE_SUITE,
    RWKU_SUITE,
    WMDP_DEDUPED_SUITE,
    WMDP_SUITE,
)
from lightning_ssiuu.evaluation.suites.tofu import TOFU_SUITE

__all__ = ["SUITES", "Suite"]

#: Suites by the name that ``evaluate --suite`` takes.
SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        *(TOFU_SUITE, MUSE_SUITE, WMDP_SUITE, WMDP_DEDUPED_SUITE, RWKU_SUITE, KNOWUNDO_SUITE, LUME_SUITE),
        FAITHUN_SUITE,
    )
}
