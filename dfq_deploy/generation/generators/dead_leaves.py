"""Dead leaves: shapes that cover one another, as things do in photographs (see `leaves`).

The model is not asked. Such images have what those made by a model lack, smooth areas, edges and large structures, and
they cost nothing. As calibration images they are best beside the latter, or where those start (`dfq`).
"""

import numpy as np

from calibrators.images import ImageSet
from dfq_deploy.generation import GenerateOptions, Progress, quiet
from dfq_deploy.generation.batching import provenance
from dfq_deploy.generation.leaves import dead_leaves
from dfq_deploy.models import Model

__all__ = ["generate"]


def generate(model: Model, options: GenerateOptions, *, progress: Progress = quiet) -> ImageSet:
    """`options.count` images of dead leaves for `model`, see `Generator`."""
    images = []
    for number in range(options.count):
        images.append(dead_leaves(np.random.default_rng([options.seed, options.first + number]), model.preprocess))
        progress(number + 1, options.count, {})
    made_by = provenance("dead_leaves", model, options)
    return ImageSet.of(np.stack(images), model.preprocess, source="synthetic:dead_leaves", made_by=made_by)
