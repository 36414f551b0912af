"""Losses against plain NumPy, and their gradients."""

import math

import numpy as np
import pytest
import torch

from dfq_deploy.generation.losses import (
    _entropy_v1,
    attention_alignment,
    discrepancy,
    kernel_entropy,
    patch_similarity_entropy,
    patch_similarity_entropy_v1,
    statistics_distance,
    total_variation,
    total_variation_scale,
)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def entropy_reference(samples: np.ndarray, *, points: int, bandwidth: float, low: float, high: float) -> float:
    grid = np.linspace(low, high, points)
    density = np.array([np.exp(-((x - samples) ** 2) / (2 * bandwidth**2)).mean() for x in grid])
    density = density / math.sqrt(2 * math.pi * bandwidth**2) + 1e-4
    return float(np.trapezoid(-density * np.log(density), grid))


def cosines(patches: np.ndarray) -> np.ndarray:
    unit = patches / np.linalg.norm(patches, axis=-1, keepdims=True)
    return unit @ unit.T


def test_v1_entropy_is_that_of_all_pairs_on_ten_points():
    patches = draws(3, 2, 7, 5)
    samples = np.array([[cosines(window).ravel() for window in image] for image in patches.numpy()]).reshape(3, -1)
    wanted = np.mean(
        [entropy_reference(s, points=10, bandwidth=0.01, low=samples.min(), high=samples.max()) for s in samples]
    )
    assert patch_similarity_entropy_v1(patches).item() == pytest.approx(wanted, rel=1e-9)


def test_fast_entropy_is_that_of_the_pairs_of_the_subset():
    patches, windows, tokens = draws(3, 4, 9, 5), torch.tensor([2, 0]), torch.tensor([8, 1, 4, 5])
    upper = np.triu_indices(4, 1)
    chosen = patches.numpy()[:, windows][:, :, tokens]
    samples = np.array([[cosines(window)[upper] for window in image] for image in chosen]).reshape(3, -1)
    low, high = samples.min(), samples.max()
    bandwidth = max((high - low) / 16, 0.01)
    wanted = np.mean([entropy_reference(s, points=16, bandwidth=bandwidth, low=low, high=high) for s in samples])
    got = patch_similarity_entropy(patches, windows=windows, tokens=tokens)
    assert got.item() == pytest.approx(wanted, rel=1e-9)


def test_entropy_of_a_gaussian():
    samples = 0.1 * draws(2, 5000)
    got = kernel_entropy(samples, torch.linspace(-0.5, 0.5, 64).double(), torch.tensor(0.02).double())
    wanted = 0.5 * math.log(2 * math.pi * math.e * (0.1**2 + 0.02**2))
    assert got.tolist() == pytest.approx([wanted, wanted], abs=0.03)


def test_gradient_of_kernel_entropy():
    grid, bandwidth = torch.linspace(-2, 2, 6).double(), torch.tensor(0.5).double()
    assert torch.autograd.gradcheck(lambda s: kernel_entropy(s, grid, bandwidth), draws(2, 5).requires_grad_())


@pytest.mark.parametrize("form", ["fast", "v1"])
def test_gradient_of_patch_similarity(form: str):
    # The grid's ends carry no gradient, so pairs of fixed patches (cosines 1 and -1) hold them in place.
    fixed = draws(2, 1, 1, 3, seed=1)
    windows, tokens = torch.tensor([0]), torch.arange(6)

    def entropy(moving: torch.Tensor) -> torch.Tensor:
        patches = torch.cat([fixed, fixed, -fixed, moving], dim=2)
        if form == "v1":
            return patch_similarity_entropy_v1(patches)
        return patch_similarity_entropy(patches, windows=windows, tokens=tokens)

    # V1's kernel is narrow against its grid: small steps.
    assert torch.autograd.gradcheck(entropy, draws(2, 1, 3, 3).requires_grad_(), eps=1e-7, atol=1e-4)


def test_v1_gradient_on_the_way_is_autograds_own():
    first, second = (draws(2, 1, 6, 4).requires_grad_() for _ in range(2))
    (3 * patch_similarity_entropy_v1(first)).backward()
    (3 * _entropy_v1(second)).backward()
    torch.testing.assert_close(first.grad, second.grad)


def test_discrepancy_is_the_mean_absolute_error_by_the_mean_size():
    outputs, wanted = draws(3, 5), draws(3, 5, seed=1)
    a, b = outputs.numpy(), wanted.numpy()
    assert discrepancy(outputs, wanted).item() == pytest.approx(np.abs(a - b).mean() / np.abs(b).mean())
    assert torch.autograd.gradcheck(discrepancy, (outputs.requires_grad_(), wanted))
    assert discrepancy(torch.ones(2, 3), torch.zeros(2, 3)).isfinite()


def test_discrepancy_does_not_fall_with_the_size_of_what_is_wanted():
    outputs, wanted = draws(3, 5), draws(3, 5, seed=1).requires_grad_()
    discrepancy(outputs, wanted).backward()
    size = wanted.detach().abs().mean()
    torch.testing.assert_close(wanted.grad, (wanted.detach() - outputs).sign() / (15 * size))


def test_total_variation_against_numpy():
    x = draws(2, 3, 5, 6)
    p = x.numpy()
    pairs = [
        (p[..., 1:], p[..., :-1]),
        (p[..., 1:, :], p[..., :-1, :]),
        (p[..., 1:, 1:], p[..., :-1, :-1]),
        (p[..., 1:, :-1], p[..., :-1, 1:]),
    ]
    wanted = sum(math.sqrt(((a - b) ** 2).sum()) for a, b in pairs)
    assert total_variation(x).item() == pytest.approx(wanted)
    assert torch.autograd.gradcheck(total_variation, x.requires_grad_())


def test_total_variation_of_a_flat_image_has_a_finite_gradient():
    flat = torch.ones(1, 3, 4, 4, requires_grad=True)
    total_variation(flat).backward()
    assert torch.isfinite(flat.grad).all()


@pytest.mark.parametrize(("batch", "size", "scale"), [(32, (224, 224), 1), (8, (224, 224), 0.5), (32, (112, 112), 0.5)])
def test_total_variation_scale(batch: int, size: tuple[int, int], scale: float):
    assert total_variation_scale(batch, size) == pytest.approx(scale)


def test_total_variation_grows_as_its_scale_says():
    image = draws(1, 1, 64, 64)
    of_one, of_four = total_variation(image), total_variation(image.repeat(4, 1, 1, 1))
    assert of_four / of_one == pytest.approx(total_variation_scale(4, (64, 64)) / total_variation_scale(1, (64, 64)))


def test_attention_alignment_against_numpy():
    rows, priors = draws(3, 2, 4, 5).abs(), draws(3, 2, 4, 5, seed=1).abs()
    r, p = rows.numpy(), priors.numpy()
    wanted = sum(((r[:, :, h] - p[:, :, h]) ** 2).mean() / (p[:, :, h] ** 2).mean() for h in range(4))
    assert attention_alignment(rows, priors).item() == pytest.approx(wanted)
    assert attention_alignment(torch.zeros_like(priors), priors).item() == pytest.approx(4)
    assert torch.autograd.gradcheck(lambda x: attention_alignment(x, priors), rows.requires_grad_())


def test_statistics_distance_against_numpy():
    features, mean, std = draws(3, 4, 2, 5), draws(4, seed=1), draws(4, seed=2).abs()
    flat = features.numpy().reshape(3, 4, -1)
    wanted = (flat.mean(2) - mean.numpy()) ** 2 + (np.sqrt(flat.var(2) + 1e-6) - std.numpy()) ** 2
    assert statistics_distance(features, mean, std).item() == pytest.approx(wanted.sum() / 3)
    assert torch.autograd.gradcheck(lambda x: statistics_distance(x, mean, std), features.requires_grad_())
    flat = torch.zeros(1, 2, 3, 3, requires_grad=True)
    statistics_distance(flat, torch.tensor(0.0), torch.tensor(1.0)).backward()
    assert torch.isfinite(flat.grad).all()
