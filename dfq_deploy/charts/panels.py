"""Small multiples for a web page: a panel per kind of layer, what is shown along the network in each.

They come out as SVG whose text is text and whose colours are the page's own, so that they follow its dark mode and are
read by what reads the page. Narrow, so that a phone shows them without shrinking.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

__all__ = ["Panel", "Series", "draw_panels"]

_WIDTH, _HEIGHT, _COLUMNS = 4.7, 1.25, 2  # inches: of the chart, of a panel
# What matplotlib draws in and the page's style names instead.
_INK, _GRID = "#010203", "#010204"
_COLOURS = {
    "ink": _INK,
    "engine": "#010205",
    "reference": "#010206",
    "float": "#010207",
    "good": "#010208",
    "bad": "#010209",
}
_SETTINGS: Any = {  # which matplotlib types as a literal each
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are names
    "hatch.linewidth": 0.8,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "hatch.color": _INK,
}
_VARIABLES = {_GRID: "--rule", **{colour: f"--{name}" for name, colour in _COLOURS.items()}}


@dataclass(frozen=True)
class Series:
    """One thing that is shown in each panel.

    Attributes:
        label: What it is, for the legend.
        colour: `engine`, `reference`, `float`, `good`, `bad` or `ink`: the page's name of a colour.
        values: By layer or site; what has none is not drawn.
        mark: How it is drawn: `bar`, `hatch` (a bar that is not so) or a matplotlib marker.
    """

    label: str
    colour: str
    values: Mapping[str, float]
    mark: str = "bar"


@dataclass(frozen=True)
class Panel:
    """A kind of layer.

    Attributes:
        title: Its name.
        names: Its members in the order of the network, some of which the series have values for.
        along: Whether a member's number is its place in the network.
    """

    title: str
    names: tuple[str, ...]
    along: bool = True


def draw_panels(
    panels: Sequence[Panel],
    series: Sequence[Series],
    *,
    key: str,
    axis: str,
    says: str,
    down: bool = False,
    line: tuple[str, float] | None = None,
) -> str:
    """An `svg` element with a panel for each kind, all to one scale.

    Args:
        panels: The kinds.
        series: What is shown.
        key: Tells the charts of one page apart.
        axis: What is along the vertical axis.
        says: What the chart shows, for who cannot see it.
        down: The axis runs from large to small values, so that bars grow towards small ones.
        line: Label and value of a dashed line through all panels.
    """
    rows = math.ceil(len(panels) / _COLUMNS)
    start, end = _span(series, line, down)
    with rc_context({**_SETTINGS, "svg.hashsalt": key}):
        figure = Figure(figsize=(_WIDTH, 0.75 + _HEIGHT * rows), layout="constrained", facecolor="none")
        grid = figure.subplots(rows, _COLUMNS, sharey=True, squeeze=False).ravel()
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        for axes, panel in zip(grid, panels, strict=False):
            _draw(axes, panel, series, start)
            axes.set_ylim(start, end)
            if line:
                axes.axhline(line[1], color=_INK, linewidth=1, linestyle="--", label=line[0])
        shown = dict(
            pair for axes in grid[: len(panels)] for pair in zip(*axes.get_legend_handles_labels()[::-1], strict=True)
        )
        figure.legend(
            shown.values(), shown.keys(), loc="outside upper left", ncols=2, fontsize=9.5, frameon=False, borderpad=0
        )
        figure.supylabel(axis, fontsize=9.5)
        out = io.StringIO()
        unsaid = dict.fromkeys(("Date", "Creator", "Type", "Format"))
        figure.savefig(out, format="svg", metadata=unsaid, transparent=True)
    return _for_a_page(out.getvalue(), says)


def _span(series: Sequence[Series], line: tuple[str, float] | None, down: bool) -> tuple[float, float]:
    """Where the bars start and the axis ends."""
    values = [value for one in series for value in one.values.values() if math.isfinite(value)]
    values += [line[1]] if line else []
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.08 * (high - low) or 1.0
    return (high + room, low - room) if down else (low - room, high + room)


def _draw(axes: Axes, panel: Panel, series: Sequence[Series], start: float) -> None:
    for one in series:
        places = [
            (place, one.values[name])
            for place, name in enumerate(panel.names)
            if math.isfinite(one.values.get(name, math.nan))
        ]
        if not places:
            continue
        x, y = zip(*places, strict=True)
        colour = _COLOURS[one.colour]
        if one.mark in ("bar", "hatch"):
            axes.bar(
                x,
                [value - start for value in y],
                bottom=start,
                width=0.78,
                color="none" if one.mark == "hatch" else colour,
                edgecolor=colour,
                linewidth=0.8,
                hatch="/////" if one.mark == "hatch" else None,
                label=one.label,
            )
        else:
            axes.plot(
                x, y, one.mark, linestyle="", markersize=4, color=colour, fillstyle="none", label=one.label, zorder=3
            )
    axes.set_title(panel.title, fontsize=10.5, loc="left", pad=3)
    axes.set_xlim(-0.7, len(panel.names) - 0.3)
    if panel.along:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}" if value >= 0 else ""))
    else:
        axes.set_xticks([])
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=9.5, length=0, pad=2)


def _for_a_page(svg: str, says: str) -> str:
    """The element alone, as wide as its place, in the page's colours; it keeps the ids that it refers to."""
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    start = svg.index("<svg")
    end = svg.index(">", start)
    box = svg[start:end].partition('viewBox="')[2].partition('"')[0]
    head = f'<svg viewBox="{box}" xmlns="http://www.w3.org/2000/svg" class="chart" role="img"'
    return f'{head} aria-label="{escape(says)}"{svg[end:]}'
