"""Images of one generator, or of several in equal shares, as one set.

Generators differ in what their images lack, so that several together come closer to real images than either alone.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from calibrators.images import ImageSet
from calibrators.registry import pick
from dfq_deploy.generation import GenerateOptions, Progress, quiet
from dfq_deploy.models import Model

__all__ = ["make_images"]


def make_images(
    generators: Sequence[str], model: Model, options: GenerateOptions, *, progress: Progress = quiet
) -> ImageSet:
    """`options.count` images in all, the first generator's first; `progress` is told of one after the other.

    Raises:
        ImagesError: A generator cannot work on the model.
    """
    parts: list[ImageSet] = []
    for number, name in enumerate(generators):
        count = (options.count + number) // len(generators)
        part = pick("dfq_deploy.generation.generators", name).generate(
            model, replace(options, count=count), progress=progress
        )
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
