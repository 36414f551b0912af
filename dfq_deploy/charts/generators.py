"""How well the images of each generator calibrate, a panel per number format and chain of refine passes."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dfq_deploy.charts.saving import check_format, save
from dfq_deploy.generator_bench.recipe import NOISE, REAL
from dfq_deploy.generator_bench.results import GeneratorBench, Row

__all__ = ["plot_generators"]

_ENDS = {NOISE: "#767676", REAL: "#a02c2c"}  # what the others are between
_OTHERS = "#2f6f9f"
_PANEL, _LINE = 2.9, 0.32  # inches: width of a panel, height of a generator in it
_LEAST_ROOM = 0.25  # points beside what is drawn, where all of it is at one place
_APART = 0.13  # of a generator's height: its seeds above, their mean below


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
    path = Path(path)
    check_format(path)
    size = (1.6 + _PANEL * max(2, len(schemes)), 1.6 + (0.9 + _LINE * len(names)) * len(refines))
    figure = Figure(figsize=size, layout="constrained")
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
    save(figure, path)


def _draw_generators(axes: Axes, rows: list[Row]) -> None:
    """A line per generator: its seeds, their mean and deviation, and how long its images took."""
    for height, row in enumerate(rows):
        colour, spread = _ENDS.get(row.generator, _OTHERS), row.spread("agreement")
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
