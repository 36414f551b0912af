"""The chart of patch similarity: how alike the patches of an image are to the model, for several sets of images."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dfq_deploy.charts.saving import check_format, save
from dfq_deploy.charts.sets import COLOURS, NAMES

__all__ = ["plot_similarity"]


def plot_similarity(counts: Mapping[str, Mapping[str, np.ndarray]], title: str, path: str | Path) -> None:
    """Draw a panel per layer with the density of cosine similarities of each set.

    Args:
        counts: Per layer and set a histogram from -1 to 1; see `similarity_histograms`.
        title: Which model and images these are.
        path: File to write; its suffix, such as .png or .svg, names the format.

    Raises:
        RecipeError: matplotlib writes no such format.
    """
    path = Path(path)
    check_format(path)
    figure = Figure(figsize=(4 * len(counts) + 0.5, 4), layout="constrained")
    panels = figure.subplots(1, len(counts), sharex=True, squeeze=False)[0]
    for axes, (layer, sets) in zip(panels, counts.items(), strict=True):
        for name, histogram in sets.items():
            edges = np.linspace(-1, 1, len(histogram) + 1)
            density = histogram / histogram.sum() / (edges[1] - edges[0])
            axes.stairs(density, edges, color=COLOURS[name], linewidth=1.6, label=NAMES[name])
        axes.set_title(layer, fontsize=10, loc="left")
        axes.set_xlim(-1, 1)
        axes.set_xticks([-1, -0.5, 0, 0.5, 1])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("cosine similarity of two patches' softmax·V")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("density")
    figure.suptitle(title, fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    save(figure, path)
