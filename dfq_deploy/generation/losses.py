"""What image synthesis minimises: pure functions of captured tensors, differentiable, all in float32.

Tensors come in, scalars go out. Nothing here waits for the device, draws a random number or knows a model; which
tokens are looked at, and with which weight a term counts, is the recipe's business.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "attention_alignment",
    "discrepancy",
    "kernel_entropy",
    "patch_similarities",
    "patch_similarity_entropy",
    "patch_similarity_entropy_v1",
    "statistics_distance",
    "total_variation",
    "total_variation_scale",
]

_GRID = 16  # points at which the fast form evaluates the density
_V1_GRID = 10
_V1_BANDWIDTH = 0.01  # the fast form's smallest one, too
_FLOOR = 1e-4  # added to a density, so that its logarithm stays finite
_LEAST_VARIANCE = 1e-6  # added to a variance, so that its root has a slope


def patch_similarity_entropy(patches: Tensor, *, windows: Tensor, tokens: Tensor) -> Tensor:
    """Differential entropy of the cosine similarities between patches: high where an image has structure.

    Every pair within a window counts once, a patch with itself not at all. The windows of one image make one
    sample; pairs across windows are not compared.

    Args:
        patches: Features (B, windows, tokens, d), float32: attn·V averaged over the heads, no prefix tokens.
        windows: Indices (w,) int64 of the windows to look at.
        tokens: Indices (n,) int64 of the tokens to look at in each, n >= 2.

    Returns:
        Mean entropy over the B images in nats, a scalar.

    Source: PSAQ-ViT (arXiv 2203.02250), patch similarity and its entropy. Differs: a subset of the patches,
    the off-diagonal upper triangle instead of all pairs, 16 grid points instead of 10, and a bandwidth of about the
    grid's spacing, since with 10 points and h = 0.01 half the pairs of a wide distribution get no gradient.
    """
    samples = patch_similarities(patches.index_select(1, windows).index_select(2, tokens))
    low, high = samples.detach().aminmax()
    bandwidth = ((high - low) / _GRID).clamp(min=_V1_BANDWIDTH)
    return kernel_entropy(samples, _grid(low, high, _GRID), bandwidth).mean()


def patch_similarities(patches: Tensor) -> Tensor:
    """Cosine similarity of every pair of patches within a window, each pair once: (B, windows · pairs).

    Args:
        patches: Features (B, windows, tokens, d), float32, of two tokens or more.
    """
    directions = F.normalize(patches, dim=-1)
    similarities = directions @ directions.transpose(-2, -1)  # (B, windows, tokens, tokens)
    tokens = patches.shape[2]
    first, second = torch.triu_indices(tokens, tokens, offset=1, device=patches.device)
    return similarities[..., first, second].flatten(1)


def patch_similarity_entropy_v1(patches: Tensor) -> Tensor:
    """The same entropy by V1's own arithmetic: all pairs of all patches, 10 grid points, h = 0.01.

    The cosine is taken of two broadcast tensors of shape (B, windows, N, N, d), as V1's code does: at B = 32,
    N = 196, d = 64 each of them is 300 MiB. The gradient is computed on the way forward, so that only one block's
    tensors lie in memory at a time; the arithmetic is not changed by that.

    Args:
        patches: Features (B, windows, N, d), float32: attn·V averaged over the heads, no prefix tokens.

    Returns:
        Mean entropy over the B images in nats, a scalar.

    Source: PSAQ-ViT (arXiv 2203.02250) and its code at d2c726f: every entry of the N x N similarity matrix, the
    diagonal included; a Gaussian kernel with h = 0.01; a grid of 10 points between the smallest and the largest
    similarity in the batch; density + 1e-4; trapezoid rule. Differs: in a windowed model V1 drops the first
    token of each window as if it were a class token; here the caller drops the model's true prefix tokens.
    """
    entropy: Tensor = _GradientOnTheWay.apply(patches)
    return entropy


class _GradientOnTheWay(torch.autograd.Function):
    """`_entropy_v1`, differentiated in the forward pass, after which its large tensors are freed."""

    @staticmethod
    def forward(ctx: Any, patches: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = patches.detach().requires_grad_()
            entropy = _entropy_v1(leaf)
            (ctx.gradient,) = torch.autograd.grad(entropy, leaf)
        return entropy.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        scaled: Tensor = ctx.gradient * gradients[0]
        return scaled


def _entropy_v1(patches: Tensor) -> Tensor:
    similarities = F.cosine_similarity(patches.unsqueeze(2), patches.unsqueeze(3), dim=-1)  # (B, windows, N, N)
    samples = similarities.flatten(1)
    low, high = samples.detach().aminmax()
    bandwidth = torch.full_like(low, _V1_BANDWIDTH)
    return kernel_entropy(samples, _grid(low, high, _V1_GRID), bandwidth).mean()


def _grid(low: Tensor, high: Tensor, points: int) -> Tensor:
    """`points` equally spaced points from `low` to `high`, made on their device: no value comes to the host."""
    return low + (high - low) * torch.linspace(0, 1, points, dtype=low.dtype, device=low.device)


def kernel_entropy(samples: Tensor, grid: Tensor, bandwidth: Tensor) -> Tensor:
    """Differential entropy of the densities that samples come from, by a Gaussian kernel and the trapezoid rule.

    Args:
        samples: (B, M), one row per density.
        grid: (G,) ascending points between which the entropy is integrated.
        bandwidth: The kernel's standard deviation, a scalar tensor.

    Returns:
        Entropies (B,) in nats.
    """
    shrink = 1 / (bandwidth * math.sqrt(2))
    distances = (grid * shrink).unsqueeze(1) - (samples * shrink).unsqueeze(1)  # (B, G, M)
    kernels = torch.exp(-(distances * distances))
    density = kernels.mean(-1) / (bandwidth * math.sqrt(2 * math.pi)) + _FLOOR
    return torch.trapezoid(-density * density.log(), grid, dim=-1)


def discrepancy(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute error of `outputs`, relative to the mean size of what is `wanted`: a scalar.

    The size counts as a constant: outputs come no closer by what is wanted becoming larger.

    Args:
        outputs: What a model puts out, of any shape.
        wanted: What it should put out, of the same shape.

    Source: PSAQ-ViT V2 (arXiv 2209.05687): the mean absolute error between teacher and student. The division is ours.
    """
    size = wanted.detach().abs().mean().clamp(min=torch.finfo(wanted.dtype).tiny)
    return (outputs - wanted).abs().mean() / size


def total_variation(pixels: Tensor) -> Tensor:
    """Roughness of a batch of images (B, C, H, W): four norms of neighbour differences, added up, a scalar.

    Right, lower, lower-right and lower-left neighbours; each norm runs over the whole batch, so the value grows with
    the square root of the number of pixels.

    Source: PSAQ-ViT (arXiv 2203.02250), the image prior in its code at d2c726f.
    """
    right = pixels[..., :, 1:] - pixels[..., :, :-1]
    lower = pixels[..., 1:, :] - pixels[..., :-1, :]
    lower_right = pixels[..., 1:, 1:] - pixels[..., :-1, :-1]
    lower_left = pixels[..., 1:, :-1] - pixels[..., :-1, 1:]
    total = pixels.new_zeros(())
    for differences in (right, lower, lower_right, lower_left):
        total = total + torch.linalg.vector_norm(differences)
    return total


def total_variation_scale(batch: int, size: tuple[int, int]) -> float:
    """What a total variation target meant for 32 images of 224 x 224 is multiplied by for another shape.

    Source: ours, sqrt(batch / 32) · sqrt(height · width) / 224. PSAQ-ViT gives a target for one shape only.
    """
    return math.sqrt(batch / 32) * math.sqrt(size[0] * size[1]) / 224


def attention_alignment(rows: Tensor, priors: Tensor) -> Tensor:
    """How far attention is from its prior: per head a mean squared error, added up, a scalar.

    Args:
        rows: (B, windows, heads, tokens), attention to each patch.
        priors: The same shape, what it should be.

    Source: SPDFQ (arXiv 2412.16553), Attention Priors Alignment. Differs: a head's error is divided by the mean square
    of its priors, so that 1 is the error of no attention at all, and a model's number of patches does not matter.
    """
    error = (rows - priors).square().mean((0, 1, 3))
    return (error / priors.square().mean((0, 1, 3))).sum()


def statistics_distance(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Squared distance between each image's statistics per channel and those given, added up over channels, a scalar.

    Args:
        features: (B, C, H, W).
        mean: (C,), or a scalar for all channels, what each image's means should be.
        std: The same of its standard deviations.

    Returns:
        The mean over the B images.

    Source: ZeroQ (arXiv 2001.00281), distilled data; per image, as in its code.
    """
    values = features.flatten(2)
    centred = values - values.mean(2, keepdim=True)
    deviations = (centred.square().mean(2) + _LEAST_VARIANCE).sqrt()
    distance = (values.mean(2) - mean).square() + (deviations - std).square()
    return distance.sum(1).mean()
