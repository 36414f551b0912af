"""The chart of attention: a few images, what the heads of a deep layer attend to, and what they were asked to."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calibrators.pictures import picture
from calibrators.preprocess import Preprocess
from dfq_deploy.charts.saving import check_format, save
from dfq_deploy.generation.seen import AttentionMaps

__all__ = ["plot_attention"]

_HEADS = 6  # drawn, at most, evenly spaced
_SIDE = 1.5  # inches
_LEAST_WIDTH = 6.5  # inches, for the title


def plot_attention(maps: AttentionMaps, title: str, preprocess: Preprocess, path: str | Path) -> None:
    """Draw each image, beside it the attention of each head and, where there are any, below that the priors.

    Args:
        maps: What the heads attend to.
        title: Which model and images these are.
        preprocess: What made the images model-ready.
        path: File to write; its suffix, such as .png or .svg, names the format.

    Raises:
        RecipeError: matplotlib writes no such format.
    """
    path = Path(path)
    check_format(path)
    kinds = {"attention": maps.rows} | ({} if maps.priors is None else {"prior": maps.priors})
    count, heads = maps.rows.shape[:2]
    drawn = np.arange(min(heads, _HEADS)) * heads // min(heads, _HEADS)
    rows, columns = count * len(kinds), 1 + len(drawn)
    figure = Figure(figsize=(max(_LEAST_WIDTH, 0.6 + _SIDE * columns), 0.9 + 1.12 * _SIDE * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for image in range(count):
        shown = picture(maps.images[image], preprocess)
        grid[image * len(kinds), 0].imshow(shown, cmap="gray", vmin=0, vmax=255)
        for below, (kind, values) in enumerate(kinds.items()):
            for column, head in enumerate(drawn, start=1):
                axes = grid[image * len(kinds) + below, column]
                _draw_map(axes, values[image, head])
                if image == below == 0:
                    axes.set_title(f"head {head}", fontsize=9)
                if len(kinds) > 1 and column == 1:
                    axes.text(-0.06, 0.5, kind, rotation=90, va="center", ha="right", transform=axes.transAxes)
    asked = "" if maps.priors is not None else " (no priors were asked for)"
    lines = (
        title,
        f"attention of the {maps.of} to each patch, {maps.layer}{asked}",
        "each map from 0 (dark) to its largest share, in % below it",
    )
    figure.suptitle("\n".join(lines), fontsize=9)
    save(figure, path)


def _draw_map(axes: Axes, shares: np.ndarray) -> None:
    axes.imshow(shares, cmap="magma", vmin=0, interpolation="nearest")
    axes.text(0.5, -0.02, f"{100 * shares.max():.2g}", fontsize=7, va="top", ha="center", transform=axes.transAxes)
