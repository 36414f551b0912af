"""Dead leaves: shapes that cover one another, as things do in photographs (see `leaves`).

The model is not asked. Such images have what those made by a model lack, smooth areas, edges and large structures, and
they cost nothing. As calibration images they are best beside the latter, or where those start (`dfq`).
"""

import numpy as np

from calibrators.images import ImageSet
from dfq_deploy.generation import GenerateOptions, Progress, quiet
from dfq_deploy.generation.batching import kept_batches, provenance
from dfq_deploy.generation.engine import Batch, Optimised
from dfq_deploy.generation.leaves import dead_leaves
from dfq_deploy.models import Model

__all__ = ["generate"]


def generate(model: Model, options: GenerateOptions, *, progress: Progress = quiet) -> ImageSet:
    """`options.count` images of dead leaves for `model`, see `Generator`."""

    def one_batch(batch: Batch) -> Optimised:
        numbers = range(batch.first, batch.first + batch.size)
        images = [dead_leaves(np.random.default_rng([options.seed, number]), model.preprocess) for number in numbers]
        batch.progress(1, 1, {})
        return Optimised(np.stack(images), "float32", steps=0, first={}, last={}, forward=0, backward=0)

    made_by = provenance("dead_leaves", model, options)
    made, _whole = kept_batches(made_by, model, options, one_batch, progress)
    pixels = np.concatenate([batch.pixels for batch in made])
    return ImageSet.of(pixels, model.preprocess, source="synthetic:dead_leaves", made_by=made_by)
