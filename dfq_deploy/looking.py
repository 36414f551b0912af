"""Pictures of what a model sees in images: how alike their patches are to it, and what its heads attend to.

Loads matplotlib: picked where something is drawn.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from calibrators.errors import ImagesError
from calibrators.images import ImageSet
from calibrators.pictures import seen_beside
from dfq_deploy.charts.attention import plot_attention
from dfq_deploy.charts.similarity import plot_similarity
from dfq_deploy.coverage import NOISE, OWN
from dfq_deploy.generation.making import noise_like
from dfq_deploy.generation.seen import attention_maps, similarity_histograms
from dfq_deploy.models import Model

__all__ = ["draw_beside", "draw_seen"]

_LOOKED_AT = 32  # images whose patches are compared with those of noise, evenly spaced


def draw_beside(path: Path, model: Model, images: ImageSet) -> dict[Path, str]:
    """Draw what `model` sees in the images of the file `path` beside it, held against noise; returns as `draw_seen`."""
    few = images.spread(_LOOKED_AT)
    return draw_seen(model, images, {OWN: few, NOISE: noise_like(few, model)}, *seen_beside(path))


def draw_seen(
    model: Model, images: ImageSet, compared: Mapping[str, ImageSet], similarity: Path, attention: Path
) -> dict[Path, str]:
    """Draw the two pictures; returns those that cannot be had, of which no file is left, with the reason.

    Args:
        model: The model.
        images: The images whose attention is shown.
        compared: The sets whose patch similarity is shown, `OWN` among them.
        similarity: File of the picture of patch similarity.
        attention: File of the picture of attention.
    """
    own = compared[OWN]
    draw: dict[Path, Callable[[], None]] = {
        similarity: lambda: plot_similarity(
            similarity_histograms(model, compared), f"{model.name}: {len(own)} images, {own.source}", similarity
        ),
        attention: lambda: plot_attention(
            attention_maps(model, images), f"{model.name}, {images.source}", images.preprocess, attention
        ),
    }
    left_out: dict[Path, str] = {}
    for picture, plot in draw.items():
        try:
            plot()
        except ImagesError as error:
            picture.unlink(missing_ok=True)
            left_out[picture] = error.what
    return left_out
