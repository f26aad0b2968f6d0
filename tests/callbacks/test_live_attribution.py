"""What a run shows of the attributions while it trains: CSV, logged figures, TensorBoard images."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import Logger
from toys.training import FewFacts, fit, ssiuu

from lightning_ssiuu.attribution.influence import module_layer_means
from lightning_ssiuu.attribution.methods import attribution_method
from lightning_ssiuu.attribution.plots import heat_maps_figure
from lightning_ssiuu.callbacks import NeuronAttributionCallback
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.figures import pixels


class Writer:
    """What a logger of TensorBoard's kind draws on."""

    def __init__(self) -> None:
        self.images: list[tuple[str, Any, int, str]] = []

    def add_image(self, tag: str, image: Any, global_step: int, dataformats: str) -> None:
        self.images.append((tag, image, global_step, dataformats))


class FakeLogger(Logger):
    """Keeps what it is given."""

    def __init__(self, experiment: Any) -> None:
        super().__init__()
        self.given, self.metrics = experiment, []

    @property
    def experiment(self) -> Any:
        return self.given

    @property
    def name(self) -> str:
        return "fake"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(name.startswith("attribution/") for name in metrics):
            self.metrics.append((step, dict(metrics)))

    def log_hyperparams(self, *_: Any) -> None:
        pass


class Run:
    """Three steps, measured after the second and at the end, with a logger that draws and one that does not."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.drawing, self.plain = folder, FakeLogger(Writer()), FakeLogger(None)
        self.callback = NeuronAttributionCallback(4, every_n_steps=2, target="length_normalised")
        fit(ssiuu(), [self.callback], folder, 3, logger=[self.drawing, self.plain])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("live"))


def test_logged_figures_are_those_of_the_callback(run: Run) -> None:
    influence = run.callback.influence()
    for logger in (run.drawing, run.plain):
        assert [step for step, _ in logger.metrics] == [2, 3]
        figures = logger.metrics[-1][1]
        summary = {name: value for name, value in influence.items() if name != "n_spurious"}
        assert {name: figures[f"attribution/{name}"] for name in summary} == summary
        variation = run.callback.variation
        assert variation is not None
        means = module_layer_means(variation.before.by_site(variation.d_minus))
        for (layer, kind), value in means.items():
            assert figures[f"attribution/layer{layer}.{kind}/d_minus"] == value
    assert run.plain.metrics[0][1]["attribution/d_minus_total"] == run.callback.history[0]["d_minus_total"]


def test_heat_maps_are_drawn_where_there_is_a_writer(run: Run) -> None:
    *images, curves = run.drawing.given.images
    assert (curves[0], curves[2]) == ("attribution/cumulative_curves", 3)
    assert [(tag, step, kind) for tag, _, step, kind in images] == [
        ("attribution/heat_maps", 2, "HWC"),
        ("attribution/heat_maps", 3, "HWC"),
    ]
    first, last = (image for _, image, _, _ in images)
    assert last.dtype == np.uint8
    assert last.ndim == 3
    assert last.shape[2] == 3
    assert run.callback.variation is not None
    assert np.array_equal(last, pixels(heat_maps_figure(run.callback.variation)))
    assert not np.array_equal(first, last)


def test_tensorboard_itself(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(ssiuu(), [NeuronAttributionCallback(2, write=False)], tmp_path, 1, FewFacts(2, batch_size=2), logger=logger)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert "attribution/heat_maps" in events.Tags()["images"]
    assert "attribution/d_minus_total" in events.Tags()["scalars"]


def test_influence_csv_has_a_row_per_measurement(run: Run) -> None:
    with (run.folder / "influence.csv").open(encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert rows == run.callback.history
    assert [row["step"] for row in rows] == [2, 3]
    assert rows[-1]["d_plus_total"] == run.callback.influence()["d_plus_total"]


def test_a_method_by_name_and_a_budget(run: Run, tmp_path: Path) -> None:
    class Other(NeuronAttributionCallback):
        """Lightning takes one of a class."""

    class Own(NeuronAttributionCallback):
        """And so it does here."""

    options: dict[str, Any] = {"target": "length_normalised", "write": False}
    within = NeuronAttributionCallback(4, method="gradient_x_activation", memory_budget="5MB", **options)
    other = Other(4, method="joint_integrated_gradients", **options)
    own = Own(4, method=attribution_method(None, "length_normalised"), **options)
    fit(ssiuu(), [within, other, own], tmp_path, 3)
    assert list(tmp_path.iterdir()) == []
    expected = {name: value for name, value in run.callback.influence().items() if name != "n_spurious"}
    for callback in (within, own):
        figures = callback.influence()
        assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert other.influence()["d_minus_total"] != pytest.approx(expected["d_minus_total"], rel=1e-2)


@pytest.mark.parametrize(
    "method", ["ablation", "lightning_ssiuu.attribution.activation_gradient.neuron_attribution", None]
)
def test_a_method_survives_the_configuration_file(method: str | None) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(NeuronAttributionCallback, "attribution")
    config = parser.parse_object({"attribution": {"method": method, "memory_budget": "2GB"}})
    again = parser.parse_string(parser.dump(config)).attribution
    assert (again.method, again.memory_budget) == (method, "2GB")


def test_errors() -> None:
    with pytest.raises(UserError, match=r"attribution\.method: got 'shap', allowed: one of"):
        NeuronAttributionCallback(method="shap")
    with pytest.raises(UserError, match=r"attribution\.memory_budget"):
        NeuronAttributionCallback(memory_budget="plenty")
