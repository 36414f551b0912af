"""The chart of a sensitivity analysis: a bar per layer, the most harmful first."""

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dfq_deploy.analysis import Sensitivity
from dfq_deploy.charts.saving import check_format, save

__all__ = ["plot_sensitivity"]

_ROW = 0.19  # inches
_ROOM = 4.0  # dB beyond the shortest and the longest bar
_QUANTIZED, _SPARED, _WHOLE = "#2f6f9f", "#e0a458", "#a02c2c"


def plot_sensitivity(found: Sensitivity, path: str | Path) -> None:
    """Draw how much each layer hurts, as bars, the most harmful first.

    Args:
        found: A sensitivity analysis.
        path: File to write; its suffix, such as .png or .svg, names the format.

    Raises:
        RecipeError: matplotlib writes no such format.
    """
    path = Path(path)
    check_format(path)
    figure = Figure(figsize=(9, 2 + _ROW * (len(found.layers) + len(found.spared))), layout="constrained")
    axes = figure.subplots()
    _draw_bars(axes, found)
    axes.set_title(f"{found.model}, {found.scheme}\n{found.n} images, {found.images}", loc="left", fontsize=11)
    axes.set_xlabel("SQNR of the logits with this layer alone quantized, dB (the longer, the more noise)")
    figure.legend(loc="outside lower right", ncols=3, fontsize=8, frameon=False)
    save(figure, path)


def _draw_bars(axes: Axes, found: Sensitivity) -> None:
    """A bar per layer: from an SQNR at which there is nothing to see to its own, further right the more it hurts."""
    quantized = {layer.name: layer.alone.sqnr_db for layer in found.layers}
    spared = {layer.name: layer.alone.sqnr_db if layer.alone else math.inf for layer in found.spared}
    notes = {layer.name: f"{layer.noise_percent:.1f} %" for layer in found.layers}
    notes |= {layer.name: "spared" if layer.alone else "spared, not measured" for layer in found.spared}
    names = sorted(notes, key={**quantized, **spared}.__getitem__)
    rows = {name: row for row, name in enumerate(names)}
    whole = found.whole.sqnr_db
    finite = [value for value in (*quantized.values(), *spared.values(), whole) if math.isfinite(value)] or [0.0]
    start, end = max(finite) + _ROOM, min(finite) - _ROOM
    axes.set_xlim(start, end)  # now, or the labels would not see that it runs from high to low
    for values, label, colour, hatch in (
        (quantized, "quantized, with its share of the noise", _QUANTIZED, None),
        (spared, "stays float: if it were quantized", _SPARED, "////"),
    ):
        bars = axes.barh(
            [rows[name] for name in values],
            [value - start if math.isfinite(value) else 0.0 for value in values.values()],
            left=start,
            height=0.76,
            linewidth=0,
            color=colour,
            edgecolor="white",
            hatch=hatch,
            label=label,
        )
        box = {"facecolor": "white", "linewidth": 0, "pad": 0.6}
        axes.bar_label(bars, [notes[name] for name in values], padding=4, fontsize=7, bbox=box)
    if math.isfinite(whole):
        label = f"all {len(quantized)} quantized layers: {whole:.1f} dB"
        axes.axvline(whole, linewidth=1.2, linestyle="--", color=_WHOLE, label=label)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", top=True, labeltop=True)
