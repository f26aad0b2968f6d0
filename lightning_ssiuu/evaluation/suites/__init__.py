"""Suites by name: what is scored of a benchmark, by its own protocol, and which figures are made of it."""

from lightning_ssiuu.evaluation.suites.base import Suite
from lightning_ssiuu.evaluation.suites.tofu import TOFU_SUITE

__all__ = ["SUITES", "Suite"]

#: Suites by the name that ``evaluate --suite`` takes.
SUITES: dict[str, Suite] = {suite.name: suite for suite in (TOFU_SUITE,)}
