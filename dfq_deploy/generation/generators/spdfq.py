"""SPDFQ, published later as SARDFQ: images that the model attends to as if they meant something.

Noise spreads attention all over, and so do images made from patch similarity. The recipe asks each head of the deep
half of the layers for attention of a random shape of its own, optimises 1 to 4 parts of each image, enlarged, as images
in their own right, and asks for soft labels of a classifier: the class of a part, and all of them for the whole.

Source: Zhong et al., "Semantics Prompting Data-Free Quantization for Low-Bit Vision Transformers", arXiv 2412.16553:
L = alpha·L_APA + L_SL + 0.05·L_TV, 32 images, Adam at 0.2 (windowed models 0.25), 1000 steps. `exact` keeps the number
of steps and float32; the fast form takes 100 steps, computes the network in bfloat16 where that is fast and stops on a
plateau. Unconfirmed there and ours in both: what the roughness L_TV is held to (PSAQ-ViT's target), the warm-up and the
shifts (PSAQ-ViT's), how priors, parts and labels are drawn (see `priors`), bilinear enlargement, and alpha: the paper
searches one per model between 1 and 1e5, and here the error is measured in units of the prior (see `losses`), so that
one serves all.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from calibrators.images import ImageSet
from dfq_deploy.generation import GenerateOptions, Progress, quiet
from dfq_deploy.generation.attention import AttentionRows, rows_of, taps_with_rows
from dfq_deploy.generation.batching import batches, optimised_set
from dfq_deploy.generation.engine import Batch, Optimised, Stage, Term, View, fast_dtype, optimise
from dfq_deploy.generation.losses import attention_alignment
from dfq_deploy.generation.priors import attention_prior, rectangles, soft_labels
from dfq_deploy.generation.similarity import roughness, schedule
from dfq_deploy.generation.taps import AttentionTap, attention_taps
from dfq_deploy.models import Model

__all__ = ["Spdfq", "generate", "priors_of", "recipe_of"]

_STAGES = (Stage(1000, 30),)  # steps, and pixels of shift at 224 x 224
_FAST_STAGES = (Stage(100, 30),)
_FAST_PLATEAU = 0.001


def generate(model: Model, options: GenerateOptions, *, progress: Progress = quiet) -> ImageSet:
    """`options.count` SPDFQ images for `model`, see `Generator`.

    Raises:
        ImagesError: The model has no attention from patch to patch, or a term of the loss became NaN or Inf.
    """
    return Spdfq().generate(model, options, progress=progress)


def recipe_of(facts: Mapping[str, Any]) -> "Spdfq":
    """The recipe that made a set, by the set's facts."""
    return Spdfq(**{part.name: facts[part.name] for part in fields(Spdfq) if part.name in facts})


def priors_of(model: Model, facts: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """What heads were asked for, drawn again: per batch and, by the tap's name, (images, windows, heads, tokens).

    The priors of the images are in it, those of their parts are not.

    Args:
        model: The model that the images were made out of.
        facts: The set's.
    """
    recipe = recipe_of(facts)
    options = GenerateOptions(facts["count"], facts["seed"], facts["exact"], first=facts.get("first", 0))
    return recipe.priors(model, options, facts["batch"]) if recipe.alignment else iter(())


@dataclass(frozen=True)
class _Prior:
    """What the heads of one layer are asked for, (images and parts, windows, heads, tokens), and how much it weighs."""

    tap: AttentionTap
    weight: float
    rows: Tensor


@dataclass(frozen=True)
class _Drawn:
    """What a batch begins with: noise, parts (see `rectangles`), a classifier's labels of both, and priors."""

    start: Tensor
    parts: Tensor
    labels: Tensor
    priors: Sequence[_Prior]


@dataclass(frozen=True)
class Spdfq:
    """The recipe, of which each part can be left out to see what it is worth; alpha and the number of parts are ours.

    Attributes:
        alignment: Attention Priors Alignment.
        reinforcement: Multi-Semantic Reinforcement; it shows the model 3.5 times as many images.
        soft_labels: Softlabel Learning; without it each label is one class.
        alpha: Weight of the alignment.
        most_parts: Of an image.
    """

    alignment: bool = True
    reinforcement: bool = True
    soft_labels: bool = True
    alpha: float = 1.0
    most_parts: int = 4

    def generate(self, model: Model, options: GenerateOptions, *, progress: Progress = quiet) -> ImageSet:
        """As the module's `generate`, with these parts."""
        taps = taps_with_rows(model, attention_taps(model))
        one_batch = functools.partial(self._one_batch, model, taps, exact=options.exact)
        return optimised_set("spdfq", model, options, one_batch, progress, asdict(self))

    def priors(self, model: Model, options: GenerateOptions, batch: int) -> Iterator[dict[str, Tensor]]:
        """What heads were asked for in `options.count` images made `batch` at a time; see `priors_of`."""
        taps = taps_with_rows(model, attention_taps(model))
        for size, generator in batches(options, batch):
            drawn = self._drawn(model, taps, size, generator)
            yield {prior.tap.name: prior.rows[:size] for prior in drawn.priors}

    def _one_batch(
        self,
        model: Model,
        taps: Sequence[AttentionTap],
        batch: Batch,
        *,
        exact: bool,
    ) -> Optimised:
        """One batch of images."""
        size, generator = batch.size, batch.generator
        device = next(model.module.parameters()).device
        drawn = self._drawn(model, taps, size, generator)
        labels = drawn.labels.to(device)
        priors = [replace(prior, rows=prior.rows.to(device)) for prior in drawn.priors]
        rough = roughness(size, model.preprocess.size, generator)
        with rows_of([prior.tap for prior in priors] if self.alignment else []) as rows:
            terms: list[Term] = []
            if model.task == "classification":
                terms.append(
                    Term("cross_entropy", 1.0, lambda view: F.cross_entropy(view.outputs, labels[: len(view.outputs)]))
                )
            terms.append(Term("total_variation", 0.05, lambda view: rough(replace(view, pixels=view.pixels[:size]))))
            if self.alignment:
                terms.append(Term("attention", self.alpha, functools.partial(_alignment, rows, priors)))
            return optimise(
                model,
                drawn.start,
                batch,
                layers={},
                terms=terms,
                schedule=schedule(model, taps, _STAGES if exact else _FAST_STAGES, None if exact else _FAST_PLATEAU),
                dtype=None if exact else fast_dtype(device),
                augment=functools.partial(_with_parts, drawn.parts.tolist()),
            )

    def _drawn(self, model: Model, taps: Sequence[AttentionTap], size: int, generator: torch.Generator) -> "_Drawn":
        """What is drawn for a batch of `size` images before the first step, on the CPU."""
        start = torch.randn((size, *model.preprocess.shape), generator=generator)
        parts = rectangles(size, self.most_parts, model.preprocess.size, generator)
        labels = torch.empty(0)
        if model.task == "classification":
            labels = self._labels(parts[:, 0], size, model.classes, generator)
        parts = parts if self.reinforcement else parts[:0]
        height, width = model.preprocess.size
        deep = list(enumerate(taps, start=1))[len(taps) // 2 :]
        priors = [
            _Prior(tap, depth / len(taps), attention_prior(tap, size + len(parts), height / width, generator))
            for depth, tap in deep
        ]
        return _Drawn(start, parts, labels, priors)

    def _labels(self, owners: Tensor, size: int, classes: int, generator: torch.Generator) -> Tensor:
        """Probabilities of each image, then of each part: (size + parts, classes).

        Without soft labels a whole image is of the class of its first part.
        """
        of_parts = torch.randint(classes, (len(owners),), generator=generator)
        alone = F.one_hot(of_parts, classes)
        if self.soft_labels:
            together = torch.zeros(size, classes, dtype=alone.dtype).index_add(0, owners, alone)
            return soft_labels(torch.cat([together, alone]) > 0, generator)
        first = torch.searchsorted(owners.contiguous(), torch.arange(size))
        return torch.cat([alone[first], alone]).float()


def _with_parts(parts: Sequence[tuple[int, int, int, int, int]], images: Tensor) -> Tensor:
    """The images, then the parts of them (see `rectangles`), each as large as an image."""
    enlarged = [
        F.interpolate(images[image : image + 1, :, top:bottom, left:right], size=images.shape[2:], mode="bilinear")
        for image, top, bottom, left, right in parts
    ]
    return torch.cat([images, *enlarged])


def _alignment(rows: AttentionRows, priors: Sequence["_Prior"], _view: View) -> Tensor:
    """L_APA: the deeper a layer, the more it weighs."""
    return torch.stack([prior.weight * attention_alignment(rows.of(prior.tap), prior.rows) for prior in priors]).sum()
