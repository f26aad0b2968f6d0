"""Memory of a computation that never ran."""

from __future__ import annotations

import torch

from lightning_ssiuu.utils.simulation import Peak, Simulation


def test_the_peak_of_a_product() -> None:
    """The weight, the product and the sum of both: three matrices of 4 MB."""
    with Simulation(torch.device("cpu")) as simulation:
        weight = torch.empty(1000, 1000)
        simulation.tag(weight, "weights")
        for name in ("product", "again"):
            with simulation.phase(name):
                _ = (weight @ weight + 1).sum()
    assert simulation.peak("product") == Peak(12000000, {"weights": 4000000, "": 8000000})
    assert list(simulation.phases) == ["product", "again"]
