"""Data modules: forget, retain and test sets as Lightning loaders, and the data of relearning attacks."""

from lightning_ssiuu.datamodules.base import QAExample, Splits, UnlearningDataModule
from lightning_ssiuu.datamodules.custom import CustomData
from lightning_ssiuu.datamodules.facts import Facts
from lightning_ssiuu.datamodules.relearn import RelearnDataModule
from lightning_ssiuu.datamodules.tofu import TOFU

__all__ = ["TOFU", "CustomData", "Facts", "QAExample", "RelearnDataModule", "Splits", "UnlearningDataModule"]
