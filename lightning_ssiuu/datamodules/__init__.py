"""Data modules: forget, retain and test sets as Lightning loaders, and the data of relearning attacks."""

from lightning_ssiuu.datamodules.base import QAExample, Splits, UnlearningDataModule
from lightning_ssiuu.datamodules.custom import CustomData
from lightning_ssiuu.datamodules.documents import Documents
from lightning_ssiuu.datamodules.facts import Facts
from lightning_ssiuu.datamodules.faithun import FaithUn
from lightning_ssiuu.datamodules.knowundo import KnowUnDo
from lightning_ssiuu.datamodules.lume import LUME
from lightning_ssiuu.datamodules.muse import MUSE
from lightning_ssiuu.datamodules.relearn import RelearnDataModule
from lightning_ssiuu.datamodules.rwku import RWKU
from lightning_ssiuu.datamodules.tofu import TOFU
from lightning_ssiuu.datamodules.wmdp import WMDP
from lightning_ssiuu.datamodules.wmdp_deduped import WMDPDeduped
from lightning_ssiuu.datamodules.world_facts import WorldFacts

__all__ = [
    "LUME",
    "MUSE",
    "RWKU",
    "TOFU",
    "WMDP",
    "CustomData",
    "Documents",
    "Facts",
    "FaithUn",
    "KnowUnDo",
    "QAExample",
    "RelearnDataModule",
    "Splits",
    "UnlearningDataModule",
    "WMDPDeduped",
    "WorldFacts",
]
