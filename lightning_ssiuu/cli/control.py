"""What ``--control`` of ``attack`` and ``audit`` means."""

from __future__ import annotations

from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.datamodules.invented import Control, control_of
from lightning_ssiuu.utils.errors import UserError


def control_beside(data: UnlearningDataModule, given: str, oracle: bool, relearns: bool = True) -> Control | None:
    """The control that ``--control`` asks for; ``auto``: one for relearning attacks without an oracle."""
    if given in ("auto", "none"):
        return control_of(data, given) if relearns and not oracle else None
    if not relearns:
        raise UserError("control", given, "auto or none with an attack that trains nothing")
    return control_of(data, given)
