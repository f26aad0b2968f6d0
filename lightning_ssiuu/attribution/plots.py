"""The two pictures of a diagnosis: heat maps module × layer, and cumulative curves of D⁺ and D⁻."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from lightning_ssiuu.attribution.influence import InfluenceVariation, cumulative_curve, module_layer_means
from lightning_ssiuu.models.architectures import KINDS
from lightning_ssiuu.utils.figures import (
    COLOURS,
    DASHED,
    DOTTED,
    HeatMap,
    Series,
    heat_map_figure,
    line_chart,
    save_png,
)

_SIGNS = (
    ("d_plus", "D⁺", "positive influence lost (erased)", COLOURS["erased"]),
    ("d_minus", "D⁻", "negative influence gained (hidden)", COLOURS["hidden"]),
)
_POINTS = 150  # of a curve, which show the shape of half a million


def save_heat_maps(path: str | os.PathLike[str], variation: InfluenceVariation, top: int = 100) -> None:
    """Draw D⁺ and D⁻ as module × layer heat maps: the mean over each module's ``top`` neurons, on one colour scale."""
    save_png(heat_maps_figure(variation, top), path)


def heat_maps_figure(variation: InfluenceVariation, top: int = 100) -> Figure:
    """The figure of :func:`save_heat_maps`."""
    return heat_map_figure(heat_maps(variation, top))


def heat_maps(variation: InfluenceVariation, top: int = 100) -> tuple[HeatMap, HeatMap]:
    """D⁺ and D⁻ on one scale, see :func:`save_heat_maps`."""
    kinds = [kind for kind in KINDS if any(site.kind == kind for site in variation.before.sites)]
    means = [module_layer_means(variation.before.by_site(getattr(variation, sign[0])), top) for sign in _SIGNS]
    highest = max(value for values in means for value in values.values())
    plus, minus = (
        HeatMap(f"{symbol}: {meaning}", values, kinds, highest, colour)
        for (_, symbol, meaning, colour), values in zip(_SIGNS, means, strict=True)
    )
    return plus, minus


def save_cumulative_curves(path: str | os.PathLike[str], variations: Mapping[str, InfluenceVariation]) -> None:
    """Draw the cumulative D⁺ and D⁻ over neurons sorted by each, a pair of curves for every model by its name."""
    save_png(cumulative_figure(variations), path)


def cumulative_figure(variations: Mapping[str, InfluenceVariation]) -> Figure:
    """The figure of :func:`save_cumulative_curves`."""
    lines = []
    for index, (name, variation) in enumerate(variations.items()):
        for attribute, symbol, _, colour in _SIGNS:
            curve = cumulative_curve(getattr(variation, attribute)).tolist()
            places = sorted({round(place) for place in np.linspace(0, len(curve) - 1, _POINTS)})
            points = [(place + 1, curve[place]) for place in places]
            lines.append(Series(f"{symbol} {name}".strip(), points, colour, ("-", DASHED, "-.", DOTTED)[index % 4]))
    return line_chart(lines, "neurons, largest first", "sum of D, units of the target")
