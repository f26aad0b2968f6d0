"""The two pictures of a diagnosis: heat maps module × layer, and cumulative curves of D⁺ and D⁻."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lightning_ssiuu.attribution.influence import InfluenceVariation, cumulative_curve, module_layer_means
from lightning_ssiuu.models.architectures import KINDS
from lightning_ssiuu.utils.files import written_atomically

_PLUS, _MINUS = "#1b7f79", "#b3402f"
_PANELS = (
    ("d_plus", "D⁺: positive influence lost (erased)", "GnBu"),
    ("d_minus", "D⁻: negative influence gained (hidden)", "OrRd"),
)


def save_heat_maps(path: str | os.PathLike[str], variation: InfluenceVariation, top: int = 100) -> None:
    """Draw D⁺ and D⁻ as module × layer heat maps of the mean over each module's ``top`` neurons (shared colour scale).

    Args:
        path: PNG, SVG or PDF file.
        variation: On the forget set.
        top: Neurons averaged per module and layer.
    """
    _save(heat_map_figure(variation, top), path)


def heat_map_pixels(variation: InfluenceVariation, top: int = 100) -> np.ndarray:
    """The picture of :func:`save_heat_maps` as ``[height, width, 3]`` bytes, for a logger that takes images.

    Args:
        variation: On the forget set.
        top: Neurons averaged per module and layer.
    """
    canvas = FigureCanvasAgg(heat_map_figure(variation, top))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def heat_map_figure(variation: InfluenceVariation, top: int = 100) -> Figure:
    """The figure behind :func:`save_heat_maps`.

    Args:
        variation: On the forget set.
        top: Neurons averaged per module and layer.
    """
    sites = variation.before.sites
    kinds: list[str] = [kind for kind in KINDS if any(site.kind == kind for site in sites)]
    n_layers = 1 + max(site.layer for site in sites)
    means = {n: module_layer_means(variation.before.by_site(getattr(variation, n)), top) for n, _, _ in _PANELS}
    highest = max(max(values.values()) for values in means.values()) or 1.0
    figure = Figure(figsize=(6.4 + 0.35 * n_layers, 3.2), layout="constrained")
    for axes, (name, title, colours) in zip(figure.subplots(1, 2, sharey=True), _PANELS, strict=True):
        grid = np.full((len(kinds), n_layers), np.nan)
        for (layer, kind), value in means[name].items():
            grid[kinds.index(kind), layer] = value
        image = axes.imshow(grid, cmap=colours, vmin=0, vmax=highest, aspect="auto", interpolation="nearest")
        axes.set(title=title, xlabel="layer", xticks=range(0, n_layers, 1 + n_layers // 12))
        axes.set_yticks(range(len(kinds)), kinds)
        axes.title.set_fontsize(9)
        figure.colorbar(image, ax=axes)
    return figure


def save_cumulative_curves(path: str | os.PathLike[str], variations: Mapping[str, InfluenceVariation]) -> None:
    """Draw the cumulative D⁺ and D⁻ over neurons sorted by each, one pair of curves per named model.

    Args:
        path: PNG, SVG or PDF file.
        variations: By the model's name; the first is drawn solid, the next dashed, and so on.
    """
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    styles: Sequence[str] = ("-", "--", "-.", ":")
    for index, (name, variation) in enumerate(variations.items()):
        style = styles[index % len(styles)]
        _curve(axes, variation.d_plus, _PLUS, style, f"D⁺ {name}".strip())
        _curve(axes, variation.d_minus, _MINUS, style, f"D⁻ {name}".strip())
    axes.set(xlabel="neurons, sorted", ylabel="cumulative influence variation", ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    _save(figure, path)


def _curve(axes: Axes, values: Tensor, colour: str, style: str, label: str) -> None:
    curve = cumulative_curve(values).numpy()
    # A few hundred points show the shape of half a million.
    points = np.unique(np.linspace(0, len(curve) - 1, 400).astype(int))
    axes.plot(points + 1, curve[points], style, color=colour, label=label)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    with written_atomically(path) as temporary:
        figure.savefig(temporary, dpi=120)
