"""PSAQ-ViT V1: images whose patches differ from each other as the patches of real images do.

A vision transformer sees noise as patches that are all alike. The recipe raises the entropy of the similarities between
the patches' softmax·V, in every block, asks for a random class per image (of a classifier), and keeps the roughness
near that of real images.

Source: Li et al., "Patch Similarity Aware Data-Free Quantization for Vision Transformers", ECCV 2022,
arXiv 2203.02250, and its code at d2c726f: L = L_PSE + CE + 0.05·|R_TV - v|, Adam at 0.2 (windowed models 0.25).
`exact` keeps its estimator, its 2 x 500 steps and float32. Both forms differ from V1 in that the weights are frozen (V1
computes gradients for them and uses none), pixels are clamped by the model's own mean and std instead of ImageNet's,
the model's true number of prefix tokens is dropped, and v and the shifts follow the batch and the image size. The
fast form moreover looks at 64 random patches a step with a cheaper estimator (see `losses`), computes the network in
bfloat16 where that is fast, and runs one stage of 100 steps with the wider shifts, which at that length ends lower than
two stages of half; it stops on a plateau.
"""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from calibrators.images import ImageSet
from dfq_deploy.generation import GenerateOptions, Progress, quiet
from dfq_deploy.generation.batching import optimised_set
from dfq_deploy.generation.engine import Batch, Optimised, Stage, Term, fast_dtype, optimise
from dfq_deploy.generation.similarity import class_term, roughness, schedule, similarity
from dfq_deploy.generation.taps import AttentionTap, attention_taps
from dfq_deploy.models import Model

__all__ = ["V1_STAGES", "PsaqV1", "generate"]

V1_STAGES = (Stage(500, 15), Stage(500, 30))
"""Those of the paper: steps, and pixels of shift at 224 x 224."""
_FAST_STAGES = (Stage(100, 30),)
_FAST_PLATEAU = 0.001


def generate(model: Model, options: GenerateOptions, *, progress: Progress = quiet) -> ImageSet:
    """`options.count` PSAQ-ViT images for `model`, see `Generator`.

    Raises:
        ImagesError: The model has no attention over patches, or a term of the loss became NaN or Inf.
    """
    return PsaqV1().generate(model, options, progress=progress)


@dataclass(frozen=True)
class PsaqV1:
    """The recipe.

    Attributes:
        stages: Run through to their end. None: those of the exact or the fast form, of which the latter stops early.
    """

    stages: Sequence[Stage] | None = None

    def generate(self, model: Model, options: GenerateOptions, *, progress: Progress = quiet) -> ImageSet:
        """As the module's `generate`, with these stages."""
        taps = attention_taps(model)
        one_batch = functools.partial(self._one_batch, model, taps, exact=options.exact)
        settings = {"settings": {"stages": [asdict(stage) for stage in self.stages]}} if self.stages else None
        return optimised_set("psaq_v1", model, options, one_batch, progress, settings)

    def _one_batch(self, model: Model, taps: Sequence[AttentionTap], batch: Batch, *, exact: bool) -> Optimised:
        """One batch of images."""
        size, generator = batch.size, batch.generator
        device = next(model.module.parameters()).device
        plateau = None if exact or self.stages else _FAST_PLATEAU
        steps = schedule(model, taps, self.stages or (V1_STAGES if exact else _FAST_STAGES), plateau)
        start = torch.randn((size, *model.preprocess.shape), generator=generator)
        classes = class_term(model, size, generator, device)
        rough = roughness(size, model.preprocess.size, generator)
        terms = (
            Term("patch_similarity", 1.0, similarity(taps, exact, steps.steps, generator, device)),
            *classes,
            Term("total_variation", 0.05, rough),
        )
        return optimise(
            model,
            start,
            batch,
            layers={tap.name: tap.layer for tap in taps},
            terms=terms,
            schedule=steps,
            dtype=None if exact else fast_dtype(device),
        )
