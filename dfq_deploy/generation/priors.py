"""Priors: what recipes draw at random before the first step, to ask it of the images.

Attention maps, soft labels and rectangles. Everything comes from a generator on the CPU, so that a seed gives the same
everywhere; nothing here knows a loss or a schedule.
"""

import math

import torch
from torch import Tensor

from dfq_deploy.generation.taps import AttentionTap

__all__ = ["attention_prior", "patch_grid", "rectangles", "soft_labels"]

_COMPONENTS = 5  # of a mixture, at most
_SPREAD = (0.05, 0.25)  # deviations of a component, of the grid's sides
_LOUD = (5.0, 10.0)  # logits of the classes in an image
_CUT = (0.3, 0.7)  # where an image is cut in two, of its sides


def attention_prior(tap: AttentionTap, images: int, aspect: float, generator: torch.Generator) -> Tensor:
    """How strongly each patch is to be attended to: a random mixture of Gaussians on the patch grid.

    Another one for each image, window and head.

    Args:
        tap: The attention that it is for.
        images: Number of images.
        aspect: The images' height over their width.
        generator: Draws them.

    Returns:
        (images, windows, heads, tokens) float32. A row adds up to what prefix tokens leave of 1.

    Source: SPDFQ (arXiv 2412.16553), Attention Priors Alignment: 1 to 5 components, the class token's own share x from
    U(0, 1). Unconfirmed there and ours: means uniform over the grid, deviations along two turned axes from 5 to 25 %
    of its sides, weights uniform; a windowed model gets a mixture per window.
    """
    height, width = patch_grid(tap.tokens, aspect if tap.windows == 1 else 1.0)
    shape = (images, tap.windows, tap.heads, _COMPONENTS, 1)
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    down, right = (
        axis.flatten() - torch.rand(shape, generator=generator) for axis in (y, x)
    )  # from each component's mean to each patch, (..., components, tokens)
    angle = math.pi * torch.rand(shape, generator=generator)
    along, across = down * angle.cos() + right * angle.sin(), right * angle.cos() - down * angle.sin()
    deviations = [_uniform(_SPREAD, shape, generator) for _ in range(2)]
    distance = (along / deviations[0]).square() + (across / deviations[1]).square()
    count = torch.randint(1, _COMPONENTS + 1, (*shape[:3], 1, 1), generator=generator)
    weights = torch.rand(shape, generator=generator) * (torch.arange(_COMPONENTS).unsqueeze(1) < count)
    density = (weights / (deviations[0] * deviations[1]) * (-0.5 * distance).exp()).sum(3)
    share = torch.rand((*shape[:3], 1), generator=generator) if tap.prefix else torch.zeros(())
    return density / density.sum(-1, keepdim=True).clamp(min=1e-12) * (1 - share)


def soft_labels(present: Tensor, generator: torch.Generator) -> Tensor:
    """Class probabilities in which the classes that are present stand out, (B, classes) float32.

    Args:
        present: (B, classes) bool.
        generator: Draws them.

    Source: SPDFQ (arXiv 2412.16553), Softlabel Learning: the softmax of logits from U(5, 10) where a class is
    present. Unconfirmed there and ours: the others' come from U(0, 1).
    """
    quiet = torch.rand(present.shape, generator=generator)
    return torch.where(present, _uniform(_LOUD, present.shape, generator), quiet).softmax(1)


def rectangles(images: int, most: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """1 to `most` rectangles in each image that do not overlap, (n, 5) int64: image, top, bottom, left, right.

    Source: SPDFQ (arXiv 2412.16553), Multi-Semantic Reinforcement: at most 4. How they are drawn is unconfirmed there
    and ours: one cut across and one down, each between 30 and 70 % of the image, and some of the four parts.
    """
    found = []
    for image in range(images):
        y, x = (round(side * _uniform(_CUT, torch.Size(), generator).item()) for side in size)
        parts = [(0, y, 0, x), (0, y, x, size[1]), (y, size[0], 0, x), (y, size[0], x, size[1])]
        count = int(torch.randint(1, most + 1, (), generator=generator))
        found += [(image, *parts[part]) for part in torch.randperm(len(parts), generator=generator)[:count].tolist()]
    return torch.tensor(found)


def patch_grid(tokens: int, aspect: float) -> tuple[int, int]:
    """Rows and columns of `tokens` patches whose ratio comes closest to `aspect`."""
    heights = [height for height in range(1, tokens + 1) if tokens % height == 0]
    height = min(heights, key=lambda height: abs(math.log(height * height / tokens / aspect)))
    return height, tokens // height


def _uniform(ends: tuple[float, float], shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
    return ends[0] + (ends[1] - ends[0]) * torch.rand(shape, generator=generator)
