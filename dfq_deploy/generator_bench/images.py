"""Real images of a benchmark: those that all is judged by, and those that sets are drawn out of to calibrate on.

No image may be on both sides.
"""

import hashlib
from pathlib import Path

import numpy as np

from calibrators.errors import ImagesError
from calibrators.images import ImageSet
from dfq_deploy.models import Model
from dfq_deploy.opening import images_to_judge_by, open_images

__all__ = ["draw", "images_to_draw", "images_to_judge"]


def images_to_judge(model: Model, place: str | None) -> ImageSet:
    """The labelled images at `place`, or those that come with the model.

    Raises:
        ImagesError: There are none, or they have no labels.
    """
    images = images_to_judge_by(model, place)
    if images is None or images.labels is None:
        raise ImagesError(
            what=f"{images.source} has no labels." if images else f"no labelled images come with `{model.name}`.",
            why="what is lost by quantization is counted in labels.",
            fix="pass --images folder:PATH, with a sub-folder per class or a labels.csv.",
        )
    return images


def images_to_draw(model: Model, place: str, count: int, judges: ImageSet) -> ImageSet:
    """The images at `place`, out of which sets of `count` can be drawn.

    Raises:
        ImagesError: There are too few, or some are among `judges`.
    """
    pool = open_images(place, model.preprocess)
    if len(pool) < count:
        raise ImagesError(
            what=f"{pool.source} holds {len(pool)} images, and each set takes {count}.",
            why="real images stand beside as many synthetic ones, and none is taken twice.",
            fix=f"pass more with --real, or --count {len(pool)}.",
        )
    known = set(_digests(judges))
    shared = sum(digest in known for digest in _digests(pool))
    if shared:
        raise ImagesError(
            what=f"{shared} of the {len(pool)} images in {pool.source} are among those to judge by, {judges.source}.",
            why="calibrated on what it is judged by, a model looks better than it is.",
            fix="pass other images with --real, or with --images.",
        )
    return pool


def draw(pool: ImageSet, count: int, seed: int, path: Path) -> None:
    """Draw a set of images, none twice, and write it."""
    drawn = np.random.default_rng(seed).choice(len(pool), count, replace=False)
    pixels = np.concatenate([pool.pixels[i : i + 1] for i in sorted(drawn.tolist())])
    ImageSet.of(pixels, pool.preprocess, source=f"{count} of {pool.source}").save(path)


def _digests(images: ImageSet) -> list[bytes]:
    """What tells each image from others; one is in memory at a time."""
    return [hashlib.sha256(image.tobytes()).digest() for image in images.batches(1)]
