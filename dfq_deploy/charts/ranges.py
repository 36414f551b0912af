"""The chart of an audit: range widths and what is cut off, site by site, in the model's order."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from dfq_deploy.audited import LIMITS_PPM, Audit
from dfq_deploy.charts.saving import check_format, save
from dfq_deploy.charts.sets import COLOURS, MARKS, NAMES
from dfq_deploy.coverage import OWN

__all__ = ["plot_ranges"]

_ROW = 0.19  # inches
_LEAST_PPM = 10.0  # below it the axis is even, so that it can show 0


def plot_ranges(found: Audit, path: str | Path) -> None:
    """Draw how wide the ranges of each set are, and how much of the others these ranges cut off.

    Args:
        found: An audit.
        path: File to write; its suffix, such as .png or .svg, names the format.

    Raises:
        RecipeError: matplotlib writes no such format.
    """
    path = Path(path)
    check_format(path)
    figure = Figure(figsize=(11, 2.6 + _ROW * len(found.sites)), layout="constrained")
    widths, cut_off = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _draw_widths(widths, found)
    _draw_cut_off(cut_off, found)
    widths.set_yticks(range(len(found.sites)), [site.site for site in found.sites], fontsize=8)
    widths.set_ylim(len(found.sites) - 0.4, -0.6)
    for axes in (widths, cut_off):
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.suptitle(f"{found.model}, {found.scheme}: {found.n} images, {found.images}: {found.level}", fontsize=11)
    handles, labels = widths.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    save(figure, path)


def _draw_widths(axes: Axes, found: Audit) -> None:
    rows = range(len(found.sites))
    for name in (*found.others, OWN):  # these images last, on top
        held = [site.own if name == OWN else site.others[name] for site in found.sites]
        axes.plot(
            [one.high - one.low for one in held],
            rows,
            linestyle="",
            marker=MARKS[name],
            markersize=5 if name == OWN else 4,
            color=COLOURS[name],
            fillstyle="full" if name == OWN else "none",  # so that marks on top of each other are all seen
            label=f"{NAMES[name]} ({found.others[name] if name != OWN else found.n})",
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("width of the range that each set gives (one division: a factor of 2, one bit)")


def _draw_cut_off(axes: Axes, found: Audit) -> None:
    rows = range(len(found.sites))
    for name in found.others:
        values = [site.others[name].excess_ppm for site in found.sites]
        axes.plot(
            values,
            rows,
            linestyle="",
            marker=MARKS[name],
            markersize=4,
            color=COLOURS[name],
            fillstyle="none",
            clip_on=False,  # 0 is on the edge
        )
    axes.set_xscale("symlog", linthresh=_LEAST_PPM, linscale=0.5)
    largest = max(held.excess_ppm for site in found.sites for held in site.others.values())
    axes.set_xlim(0, max(10 * LIMITS_PPM[1], 2 * largest))
    for limit, text in zip(LIMITS_PPM, ("doubtful", "bad"), strict=True):
        axes.axvline(limit, color="#444444", linewidth=0.9, linestyle="--")
        axes.annotate(f" {text}", (limit, 1), xycoords=("data", "axes fraction"), fontsize=8, va="bottom")
    axes.set_xlabel("values of the other sets that these ranges\ncut off, beyond their own share, ppm")
