"""Noise: what costs nothing, and what every other recipe has to beat.

Each value is drawn from N(0, 1) in the model's normalised units and clamped to what a pixel can be. The model itself is
not asked, so the exact and the fast form are one.

Source: the usual control of data-free quantization, such as PSAQ-ViT's (arXiv 2203.02250); there it is not clamped.
"""

import numpy as np
import torch

from calibrators.images import ImageSet
from dfq_deploy.generation import GenerateOptions, Progress, quiet
from dfq_deploy.generation.batching import batches, provenance
from dfq_deploy.models import Model

__all__ = ["generate"]


def generate(model: Model, options: GenerateOptions, *, progress: Progress = quiet) -> ImageSet:
    """`options.count` images of clamped Gaussian noise for `model`, see `Generator`."""
    low, high = model.preprocess.bounds
    drawn = [torch.randn((size, *model.preprocess.shape), generator=g).numpy() for size, g in batches(options)]
    pixels = np.clip(np.concatenate(drawn), low, high)
    progress(1, 1, {})
    made_by = provenance("noise", model, options)
    return ImageSet.of(pixels, model.preprocess, source="synthetic:noise", made_by=made_by)
