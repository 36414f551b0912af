"""Images of one generator, or of several in equal shares, as one set.

Generators differ in what their images lack, so that several together come closer to real images than either alone.
Images that show nothing, or all the same thing, calibrate nothing: they are refused.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from calibrators.errors import ImagesError
from calibrators.images import ImageSet
from calibrators.registry import pick
from dfq_deploy.generation import GenerateOptions, Progress, quiet
from dfq_deploy.models import Model

__all__ = ["make_images"]

_LEAST_CONTRAST = 0.01  # deviation of an image's values, and distance between images, of what lies between the bounds


def make_images(
    generators: Sequence[str], model: Model, options: GenerateOptions, *, progress: Progress = quiet
) -> ImageSet:
    """`options.count` images in all, the first generator's first; `progress` is told of one after the other.

    Raises:
        ImagesError: A generator cannot work on the model, or what it made is no set of images.
    """
    parts: list[ImageSet] = []
    for number, name in enumerate(generators):
        count = (options.count + number) // len(generators)
        part = pick("dfq_deploy.generation.generators", name).generate(
            model, replace(options, count=count), progress=progress
        )
        _check(name, part)
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    return ImageSet.of(
        np.concatenate([part.pixels[:] for part in parts]),
        model.preprocess,
        source=f"synthetic:{'+'.join(generators)}",
        made_by={name: dict(part.made_by) for name, part in zip(generators, parts, strict=True)},
        student=next((part.student for part in parts if part.student), None),
    )


def _check(generator: str, images: ImageSet) -> None:
    """Refuse images that show one value only, or are all the same; those with NaN never became a set."""
    low, high = images.preprocess.bounds
    least = _LEAST_CONTRAST * float((high - low).mean())
    first = images.pixels[0:1]
    distances = []
    for number in range(len(images)):
        image = images.pixels[number : number + 1]
        if image.std() < least:
            raise _degenerate(generator, f"image {number} is of one colour")
        distances.append(float(np.abs(image - first).mean()))
    if len(images) > 1 and max(distances) < least:
        raise _degenerate(generator, f"all {len(images)} images show the same")


def _degenerate(generator: str, fault: str) -> ImagesError:
    return ImagesError(
        what=f"the images of `{generator}` are of no use: {fault}.",
        why="ranges read off them would be those of no image that the model will see.",
        fix="check the weights, try another --seed, or another --generator.",
    )
