"""Our own recipe: images of dead leaves, moved a little way towards what the model takes for classes.

Dead leaves have the edges, the large structures, the contrast and the roughness of photographs, which images that start
from noise never get; but they mean nothing to the deep layers. A few steps towards one class per image, and towards
patches that differ from each other, give them that, while their roughness is held where it was. Each step shows the
model another half of the patches, which is as good and costs half. The steps also fill smooth areas with texture.
Photographs have such areas, and drive the first layers further there: a quarter of the images is not moved at all.

Source: ours. The patch similarity is that of PSAQ-ViT (arXiv 2203.02250). Left out, since the second moments of what
layers take in came no closer to those of real images: attention priors and soft labels as in SPDFQ (arXiv 2412.16553),
similar heads as in MimiQ (arXiv 2407.20021), a roughness that is free or that of PSAQ-ViT.
The exact and the fast form differ in precision alone.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from calibrators.images import ImageSet
from dfq_deploy.generation import GenerateOptions, Progress, quiet
from dfq_deploy.generation.batching import optimised_set, settings_of
from dfq_deploy.generation.engine import Batch, Optimised, Schedule, Stage, Term, fast_dtype, optimise
from dfq_deploy.generation.leaves import dead_leaves
from dfq_deploy.generation.losses import total_variation
from dfq_deploy.generation.patch_dropout import PatchDropout
from dfq_deploy.generation.similarity import Similarity, class_term
from dfq_deploy.generation.taps import AttentionTap, attention_taps
from dfq_deploy.models import Model

__all__ = ["Dfq", "generate"]

_STAGE = Stage(50, 30)  # steps, and pixels of shift at 224 x 224
_LEARNING_RATE = 0.1
_WARMUP = 0.2
_UNMOVED = 4  # images of which one stays dead leaves
_CHROMA = 0.1  # brighter colours than photographs' widen the ranges of the first block


def generate(model: Model, options: GenerateOptions, *, progress: Progress = quiet) -> ImageSet:
    """`options.count` images for `model`, see `Generator`.

    Raises:
        ImagesError: The model has no attention over patches, or a term of the loss became NaN or Inf.
    """
    return Dfq().generate(model, options, progress=progress)


@dataclass(frozen=True)
class Dfq:
    """The recipe, of which each part can be left out to see what it is worth.

    Attributes:
        steps: How many. None: as many as by default.
        leaves: Begin with dead leaves; without it with noise.
        classes: Ask for a class per image.
        patch_similarity: Ask for patches that differ.
        roughness: Hold the roughness at that of dead leaves.
        patch_dropout: Show the model half of the patches in each step, where it is one that takes any number.
        unmoved: Leave a quarter of the images dead leaves, where they begin with them: the last of each batch.
    """

    steps: int | None = None
    leaves: bool = True
    classes: bool = True
    patch_similarity: bool = True
    roughness: bool = True
    patch_dropout: bool = True
    unmoved: bool = True

    def generate(self, model: Model, options: GenerateOptions, *, progress: Progress = quiet) -> ImageSet:
        """As the module's `generate`, in so many steps and with these parts."""
        one_batch = functools.partial(self._one_batch, model, attention_taps(model), exact=options.exact)
        return optimised_set("dfq", model, options, one_batch, progress, settings_of(self))

    def _one_batch(self, model: Model, taps: Sequence[AttentionTap], batch: Batch, *, exact: bool) -> Optimised:
        """One batch of images."""
        generator = batch.generator
        size = batch.size - (batch.size // _UNMOVED if self.leaves and self.unmoved else 0)
        device = next(model.module.parameters()).device
        scale = min(model.preprocess.size) / 224
        schedule = Schedule(
            (Stage(self.steps or _STAGE.steps, round(_STAGE.jitter * scale)),), _LEARNING_RATE, _WARMUP, None
        )
        random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        leaves = [dead_leaves(random, model.preprocess, chroma=_CHROMA) for _ in range(batch.size)]
        classes = class_term(model, size, generator, device)
        start = torch.from_numpy(np.stack(leaves[:size]))
        rough = total_variation(start).item()
        if not self.leaves:
            start = torch.from_numpy(random.standard_normal(start.shape, np.float32))
        # All is drawn, so that images differ by the parts that are left out and by nothing else.
        dropout = PatchDropout.drawn(model.module, taps, schedule.steps, generator)
        dropout = dropout if self.patch_dropout else None
        if dropout:
            taps = [replace(tap, tokens=dropout.patches) for tap in taps]
        similarity = Term("patch_similarity", 1.0, Similarity(taps, schedule.steps, generator, device))
        roughness = Term("total_variation", 0.05, lambda view: (total_variation(view.pixels) - rough).abs())
        terms = [
            *([similarity] if self.patch_similarity else []),
            *(classes if self.classes else ()),
            *([roughness] if self.roughness else []),
        ]
        made = optimise(
            model,
            start,
            batch,
            layers={tap.name: tap.layer for tap in taps},
            terms=terms,
            schedule=schedule,
            dtype=None if exact else fast_dtype(device),
            dropout=dropout,
        )
        return replace(made, pixels=np.stack([*made.pixels, *leaves[size:]]))
