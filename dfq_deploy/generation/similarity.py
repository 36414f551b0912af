"""What recipes have in common with PSAQ-ViT: patch similarity, classes and roughness as terms, and the schedule.

The arithmetic is in `losses`. Here it meets taps, random subsets of patches and the values that PSAQ-ViT uses.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dfq_deploy.generation.engine import Schedule, Stage, Term, View
from dfq_deploy.generation.losses import (
    patch_similarity_entropy,
    patch_similarity_entropy_v1,
    total_variation,
    total_variation_scale,
)
from dfq_deploy.generation.taps import AttentionTap
from dfq_deploy.models import Model

__all__ = ["Similarity", "averaged_over_heads", "class_term", "roughness", "schedule", "similarity"]

_PATCHES = 64  # that the fast form looks at, per image, block and step
_ROUGHNESS = (2500.0, 3000.0)  # range of v for 32 images at 224 x 224
_WARMUP = 0.2  # V1: 100 of 500 steps


def class_term(model: Model, images: int, generator: torch.Generator, device: torch.device) -> tuple[Term, ...]:
    """The term that asks for a class per image, which `generator` draws; none where the task has no such class."""
    if model.task != "classification":
        return ()
    classes = torch.randint(model.classes, (images,), generator=generator).to(device)
    return (Term("cross_entropy", 1.0, lambda view: F.cross_entropy(view.outputs, classes)),)


def roughness(images: int, size: tuple[int, int], generator: torch.Generator) -> Callable[[View], Tensor]:
    """|R_TV - v| of PSAQ-ViT: how far the roughness is from one like real images', v, which is drawn here, once.

    Args:
        images: Number of images in a step.
        size: Their height and width.
        generator: Draws v, on the CPU.
    """
    lowest, highest = _ROUGHNESS
    drawn = lowest + (highest - lowest) * torch.rand((), generator=generator).item()
    wanted = drawn * total_variation_scale(images, size)
    return lambda view: (total_variation(view.pixels) - wanted).abs()


def schedule(
    model: Model, taps: Sequence[AttentionTap], stages: Sequence[Stage], plateau: float | None = None
) -> Schedule:
    """PSAQ-ViT's rates, and `stages` with the shifts, which are for 224 x 224, as the model's images are large."""
    scale = min(model.preprocess.size) / 224
    windowed = any(tap.windows > 1 for tap in taps)
    scaled = tuple(Stage(stage.steps, round(stage.jitter * scale)) for stage in stages)
    return Schedule(scaled, 0.25 if windowed else 0.20, _WARMUP, plateau)


def similarity(
    taps: Sequence[AttentionTap], exact: bool, steps: int, generator: torch.Generator, device: torch.device
) -> Callable[[View], Tensor]:
    """L_PSE, by V1's own arithmetic or in the fast form, whose subsets `generator` draws for `steps` steps."""
    return functools.partial(_similarity_v1, taps) if exact else Similarity(taps, steps, generator, device)


def _similarity_v1(taps: Sequence[AttentionTap], view: View) -> Tensor:
    """L_PSE as V1 computes it: minus the entropies of all blocks, added up."""
    return -_summed([patch_similarity_entropy_v1(averaged_over_heads(tap, view)) for tap in taps])


class Similarity:
    """L_PSE in the fast form, over a subset of patches that is another one in each step and block.

    About `_PATCHES` patches: some of the only window, or all of some windows.

    Args:
        taps: Where patches are compared.
        steps: How many steps there will be.
        generator: Draws the subsets, on the CPU.
        device: Where the images are.
    """

    def __init__(
        self, taps: Sequence[AttentionTap], steps: int, generator: torch.Generator, device: torch.device
    ) -> None:
        self._taps = taps
        self._subsets = [
            (
                _subsets(steps, tap.windows, math.ceil(_PATCHES / tap.tokens), generator).to(device),
                _subsets(steps, tap.tokens, _PATCHES, generator).to(device),
            )
            for tap in taps
        ]

    def __call__(self, view: View) -> Tensor:
        """The term in this step, a scalar."""
        return -_summed(
            [
                patch_similarity_entropy(
                    averaged_over_heads(tap, view), windows=windows[view.step], tokens=tokens[view.step]
                )
                for tap, (windows, tokens) in zip(self._taps, self._subsets, strict=True)
            ]
        )


def averaged_over_heads(tap: AttentionTap, view: View) -> Tensor:
    """What is compared: softmax·V averaged over the heads, (B, windows, tokens, head_dim)."""
    return tap.contexts(view.inputs).mean(3)


def _subsets(steps: int, available: int, wanted: int, generator: torch.Generator) -> Tensor:
    """For each step, `wanted` different numbers below `available`, or all of them: (steps, n) int64."""
    order = torch.rand((steps, available), generator=generator).argsort(1)
    return order[:, : min(wanted, available)]


def _summed(entropies: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(entropies)).sum()
