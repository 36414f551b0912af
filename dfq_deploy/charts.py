"""Charts: results as pictures for a report or a slide. Nothing is computed here.

The only module that loads matplotlib, so that what draws nothing does without it.
"""

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calibrators.errors import RecipeError
from calibrators.files import written_whole
from dfq_deploy.analysis import Sensitivity
from dfq_deploy.bench_recipe import REAL
from dfq_deploy.generator_results import GeneratorBench, Row

__all__ = ["plot_generators", "plot_sensitivity"]

_ROW = 0.19  # inches
_ROOM = 4.0  # dB beyond the shortest and the longest bar
_QUANTIZED, _SPARED, _WHOLE = "#2f6f9f", "#e0a458", "#a02c2c"
_ENDS = {"noise": "#767676", REAL: "#a02c2c"}  # what the others are between
_PANEL, _LINE = 2.9, 0.32  # inches: width of a panel, height of a generator in it
_LEAST_ROOM = 0.25  # points beside what is drawn, where all of it is at one place
_APART = 0.13  # of a generator's height: its seeds above, their mean below


def plot_sensitivity(found: Sensitivity, path: str | Path) -> None:
    """Draw how much each layer hurts, as bars, the most harmful first.

    Args:
        found: A sensitivity analysis.
        path: File to write; its suffix, such as .png or .svg, names the format.

    Raises:
        RecipeError: matplotlib writes no such format.
    """
    figure = Figure(figsize=(9, 2 + _ROW * (len(found.layers) + len(found.spared))), layout="constrained")
    path = _suited(path, figure)
    axes = figure.subplots()
    _draw_bars(axes, found)
    axes.set_title(f"{found.model}, {found.scheme}\n{found.n} images, {found.images}", loc="left", fontsize=11)
    axes.set_xlabel("SQNR of the logits with this layer alone quantized, dB (the longer, the more noise)")
    figure.legend(loc="outside lower right", ncols=3, fontsize=8, frameon=False)
    _save(figure, path)


def plot_generators(found: GeneratorBench, path: str | Path) -> None:
    """Draw how far the model agrees with float per generator: a panel per number format and chain of refine passes.

    Each panel has a scale of its own, which holds all seeds.

    Args:
        found: A benchmark of generators.
        path: File to write; its suffix, such as .png or .svg, names the format.

    Raises:
        RecipeError: matplotlib writes no such format.
    """
    quantizers = list(dict.fromkeys((row.refine, row.scheme) for row in found.rows))
    refines, schemes = (list(dict.fromkeys(values)) for values in zip(*quantizers, strict=True))
    names = list(dict.fromkeys(row.generator for row in found.rows))
    size = (1.6 + _PANEL * max(2, len(schemes)), 1.6 + (0.9 + _LINE * len(names)) * len(refines))
    figure = Figure(figsize=size, layout="constrained")
    path = _suited(path, figure)
    grid = figure.subplots(len(refines), len(schemes), sharey=True, squeeze=False)
    for line, refine in zip(grid, refines, strict=True):
        for axes, scheme in zip(line, schemes, strict=True):
            _draw_generators(axes, [row for row in found.rows if (row.refine, row.scheme) == (refine, scheme)])
            axes.set_title(f"{scheme}, {'ranges alone' if refine == 'none' else f'refine {refine}'}", fontsize=10)
            axes.set_yticks(range(len(names)), names, fontsize=9)
            axes.set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle(
        f"{found.model}\ncalibrated on {found.settings['count']} images, judged by {found.n} images, {found.images}",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    figure.supxlabel(
        "top-1 agreement with the float model, %, each panel to its own scale\n"
        "dots: seeds; bar: mean ± standard deviation; dashed: mean of noise and of real images; "
        "right: time to make a set of images",
        fontsize=8,
    )
    _save(figure, path)


def _draw_generators(axes: Axes, rows: list[Row]) -> None:
    """A line per generator: its seeds, their mean and deviation, and how long its images took."""
    for height, row in enumerate(rows):
        colour, spread = _ENDS.get(row.generator, _QUANTIZED), row.spread("agreement")
        assert spread is not None
        axes.plot(
            [result.agreement for result in row.results],
            [height - _APART] * len(row.results),
            marker="o",
            markersize=4,
            linestyle="",
            color=colour,
            alpha=0.45,
            markeredgewidth=0,
        )
        axes.errorbar(
            spread.mean,
            height + _APART,
            xerr=spread.deviation,
            color=colour,
            marker="|",
            markersize=11,
            capsize=3,
            linewidth=1.5,
        )
        if row.generator in _ENDS:
            axes.axvline(spread.mean, color=colour, linewidth=0.9, linestyle="--", zorder=1)
        if seconds := row.spread("seconds"):
            text = f"{seconds.mean:.{0 if seconds.mean >= 10 else 1}f} s" if seconds.mean >= 0.1 else "< 0.1 s"
            axes.annotate(text, (1.02, height), xycoords=axes.get_yaxis_transform(), fontsize=8, va="center")
    _span_percent(axes)
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)


def _span_percent(axes: Axes) -> None:
    """Leave room on either side of what is drawn, and show no tick beyond 100 %."""
    low, high = axes.dataLim.intervalx
    room = max(_LEAST_ROOM, 0.08 * (high - low))
    axes.set_xlim(low - room, high + room)
    axes.set_xticks([tick for tick in axes.get_xticks() if low - room <= tick <= min(high + room, 100)])


def _suited(path: str | Path, figure: Figure) -> Path:
    """`path`, in a format that matplotlib writes."""
    path = Path(path)
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        raise RecipeError(
            what=f"`{path}` names no format of pictures.",
            why=f"its suffix is `{path.suffix}`, and matplotlib writes {', '.join(sorted(formats))}.",
            fix="pass a file that ends in .png or .svg.",
        )
    return path


def _save(figure: Figure, path: Path) -> None:
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=150)


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
