"""Which devices a command is given."""

from __future__ import annotations

import pytest
import torch

from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError


def test_devices_that_are_there_and_that_are_not() -> None:
    devices = Devices("cpu", 1, precision="bf16-true")
    assert (devices.n_ranks, devices.dtype, devices.is_first) == (1, torch.bfloat16, True)
    with pytest.raises(UserError, match=r"devices: got 0, allowed: what this machine has \("):
        Devices("cpu", 0)
