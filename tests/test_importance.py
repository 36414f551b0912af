"""Which tokens matter: against Jacobians, and where only some of a layer's tokens are read, or none can be told."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from calibrators.errors import CalibrationWarning
from calibrators.importance import token_importance, token_weights
from calibrators.sites import attach_sites
from dfq_deploy.models import Model

PutOut = Callable[[Tensor], Tensor | tuple[Tensor, ...]]


def _two_tokens(tokens: Tensor) -> Tensor:
    """One number of the first token, and the second counted twice."""
    return (tokens[:, :1].square() + 2 * tokens[:, 1:2].square()).sum((1, 2))[:, None]


class _Pair(nn.Module):
    """Two layers over tokens; what is put out is made of theirs."""

    def __init__(self, put_out: PutOut = _two_tokens) -> None:
        super().__init__()
        self.put_out = put_out
        torch.manual_seed(0)
        self.first, self.second, self.idle = nn.Linear(12, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        attach_sites(self.eval().requires_grad_(False))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        tokens = images.flatten(1).unflatten(1, (-1, 12))
        return self.put_out(self.second(self.first(tokens).relu()))


class _InPlace(_Pair):
    """Changes the images that it is given."""

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        return super().forward(images.mul_(1))


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_it_is_the_squared_jacobian_of_each_token(pixels: Tensor) -> None:
    module = _Pair()
    outputs = module.second(module.first(pixels.flatten(1).unflatten(1, (-1, 12))).relu())
    (jacobian,) = torch.autograd.grad(module.put_out(outputs.requires_grad_()).sum(), outputs)
    wanted = jacobian.square().mean(-1).flatten()
    found = token_importance(module, pixels)
    assert set(found) == {"first", "second"}, "one layer is not reached"
    torch.testing.assert_close(found["second"], wanted / wanted.mean())
    assert all(float(of.mean()) == pytest.approx(1) for of in found.values())


def test_several_outputs_count_together(pixels: Tensor) -> None:
    module = _Pair(lambda tokens: (tokens[:, :1], 3 * tokens[:, 1:2], tokens.argmax(1)))
    per_token = token_importance(module, pixels)["second"].reshape(3, 16).mean(0)
    torch.testing.assert_close(per_token, torch.tensor([1.6, 14.4] + [0.0] * 14))


@pytest.mark.parametrize(
    "put_out", [lambda tokens: tokens.argmax(1), lambda tokens: tokens[:, :0].sum(1), lambda tokens: tokens / 0]
)
def test_where_no_gradient_comes_of_the_outputs_no_layer_is_told_of(pixels: Tensor, put_out: PutOut) -> None:
    assert token_importance(_Pair(put_out), pixels) == {}


def test_of_a_layer_that_is_called_twice_the_first_call_counts(pixels: Tensor) -> None:
    module = _Pair(lambda tokens: module.second(tokens.flip(1))[:, :2])
    found = token_importance(module, pixels)["second"].reshape(3, 16)
    assert (found[:, -2:] > 0).all() and not found[:, :-2].any()


def test_what_a_model_changes_in_place_counts_as_it_was(pixels: Tensor) -> None:
    """The images, and what a layer has put out."""
    plain, in_place = _Pair(lambda tokens: tokens.relu()[:, :1]), _InPlace(lambda tokens: tokens.relu_()[:, :1])
    wanted = token_importance(plain, pixels)
    assert set(wanted) == {"first", "second"}
    torch.testing.assert_close(token_importance(in_place, pixels), wanted)


def test_a_model_without_gradients_is_told_and_relative_errors_count(pixels: Tensor) -> None:
    module = _Pair(lambda tokens: torch.from_numpy(tokens.numpy()))
    with pytest.warns(CalibrationWarning, match=r"count by size alone: .*\(Can't call numpy"):
        assert token_importance(module, pixels) == {}
    wanted = torch.tensor([[1.0], [2.0], [0.0]])
    weights = token_weights(None, wanted)
    assert float(weights.mean()) == pytest.approx(1)
    torch.testing.assert_close(weights[0], 4 * weights[1])
    assert weights.isfinite().all()
    torch.testing.assert_close(token_weights(torch.tensor([1.0]), wanted), weights, msg="of other tokens")
    torch.testing.assert_close(
        token_weights(torch.tensor([0.0, 3, 0]), wanted), (weights + torch.tensor([0, 3, 0])) / 2
    )


def test_a_layer_that_only_some_images_reach_is_left_out(pixels: Tensor) -> None:
    called = iter((True, False))
    module = _Pair(lambda tokens: module.idle(tokens) if next(called) else tokens)
    assert set(token_importance(module, pixels)) == {"first", "second"}


def test_after_the_last_block_the_class_token_alone_matters(demo: Model) -> None:
    images = torch.randn(3, *demo.preprocess.shape, generator=torch.Generator().manual_seed(0))
    found = token_importance(demo.module, images)
    last = len(demo.module.blocks) - 1
    at_the_end, before = (found[f"blocks.{block}.mlp.fc2"].reshape(3, -1) for block in (last, last - 1))
    assert (at_the_end[:, 0] > 0).all() and not at_the_end[:, 1:].any()
    assert (before > 0).all()
    assert not any(parameter.requires_grad for parameter in demo.module.parameters())
