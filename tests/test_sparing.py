"""Which layers are left in float, scheme by scheme, and that noise is enough to find them and massive activations."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calibrators.scheme import SCHEMES
from calibrators.sites import SitedConv2d, SitedLinear
from dfq_deploy.models import Model
from dfq_deploy.models.loading import load_model
from dfq_deploy.sparing import layers_to_spare, massive_activations

_FIRST, _LAST = "patch_embed.proj", "head"
_INTEGERS = ("w8a8", "w8a8_asym")
_ROUNDED = (*_INTEGERS, "w8a8_fp8")


@pytest.fixture
def demo() -> Model:
    return load_model("demo")


def _change_input(model: Model, layer: str, change: Callable[[Tensor], Tensor]) -> None:
    def hook(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (change(inputs[0]),)

    model.module.get_submodule(layer).register_forward_pre_hook(hook)


def _one_huge_value(values: Tensor) -> Tensor:
    changed = values.clone()
    changed[0, 0, 0] = 1000
    return changed


@pytest.mark.parametrize("scheme", _ROUNDED)
def test_the_ends_of_the_model_are_spared(demo: Model, scheme: str) -> None:
    found = layers_to_spare(demo, SCHEMES[scheme], first_layer=False)
    assert found.keys() == {_FIRST, _LAST}
    assert found[_FIRST].startswith("it reads the image")
    assert found[_LAST].startswith("it puts out the logits")


@pytest.mark.parametrize("scheme", _ROUNDED)
def test_the_first_layer_is_quantized_where_the_run_time_wants_it(demo: Model, scheme: str) -> None:
    assert layers_to_spare(demo, SCHEMES[scheme], first_layer=True).keys() == {_LAST}


@pytest.mark.parametrize("first_layer", [False, True])
@pytest.mark.parametrize("scheme", ["w4a16", "float"])
def test_where_activations_stay_float_nothing_is_spared(demo: Model, scheme: str, first_layer: bool) -> None:
    _change_input(demo, "blocks.2.attn.qkv", _one_huge_value)
    assert layers_to_spare(demo, SCHEMES[scheme], first_layer=first_layer) == {}


@pytest.mark.parametrize("scheme", _ROUNDED)
def test_massive_activations_are_spared_from_integers_alone(demo: Model, scheme: str) -> None:
    _change_input(demo, "blocks.2.attn.qkv", _one_huge_value)
    found = layers_to_spare(demo, SCHEMES[scheme], first_layer=True)
    assert found.keys() == {_LAST, *(["blocks.2.attn.qkv"] if scheme in _INTEGERS else [])}
    if scheme in _INTEGERS:
        assert found["blocks.2.attn.qkv"].startswith(
            "its input reaches 1000 (channel 0, in 1 of 260 tokens) while 99.99% of it stays below "
        )


@pytest.mark.parametrize("scheme", _ROUNDED)
def test_a_layer_whose_input_is_the_same_for_all_images_is_spared(demo: Model, scheme: str) -> None:
    _change_input(demo, "blocks.1.mlp.fc1", lambda values: values[:1])
    found = layers_to_spare(demo, SCHEMES[scheme], first_layer=True)
    constant = "its input does not depend on the image"
    assert {layer for layer, reason in found.items() if reason == constant} == {"blocks.1.mlp.fc1", "blocks.1.mlp.fc2"}


def test_looking_leaves_no_hooks_behind(demo: Model) -> None:
    layers_to_spare(demo, SCHEMES["w8a8"], first_layer=False)
    assert not any(layer._forward_pre_hooks for layer in demo.module.modules())


def _plant(model: Model, layer: str, channels: list[int], *, tokens: list[int], images: slice) -> None:
    def hook(_layer: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        changed = output.clone()
        for channel in channels:
            changed[images, tokens, channel] = 5000.0 + 100 * channel
        return changed

    model.module.get_submodule(layer).register_forward_hook(hook)


def test_an_outlier_channel_of_the_residual_stream_is_found_with_no_image() -> None:
    model = load_model("demo")
    assert massive_activations(model) == []
    _plant(model, "blocks.1.mlp.fc2", [41], tokens=[3, 9], images=slice(None))
    found = massive_activations(model)
    norms = [f"blocks.{i}.norm{j}" for i in (2, 3) for j in (1, 2)] + ["norm"]
    assert [massive.place for massive in found if massive.stream] == norms
    first = found[0]
    assert first.place == "blocks.2.norm1"
    assert list(first.channels) == [41]
    assert first.report()["channels"] == [{"channel": 41, "largest": first.largest}]
    assert first.report().keys() == {"place", "stream", "channels", "tokens", "of", "share", "bulk", "largest"}
    assert first.largest == pytest.approx(9100, abs=5)
    assert (first.tokens, first.of, first.share) == (2 * 4, 65 * 4, 0.999)
    sizes = _sizes_at(model, "blocks.2.norm1")
    assert np.mean(sizes <= first.bulk) == pytest.approx(0.999, abs=1e-4)


def _sizes_at(model: Model, name: str) -> np.ndarray:
    seen: list[np.ndarray] = []
    low, high = map(torch.from_numpy, model.preprocess.bounds)
    noise = torch.randn(4, *model.preprocess.shape, generator=torch.Generator().manual_seed(0)).clamp(low, high)
    hook = model.module.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numpy()))
    with torch.inference_mode():
        model.module(noise)
    hook.remove()
    return np.abs(seen[0])


@pytest.mark.parametrize(
    ("channels", "named"),
    [
        ([7], "reaches 5700 (channel 7, in 1 of 260 tokens)"),
        ([3, 9], "reaches 5900 (channels 9, 3, in 1 of 260 tokens)"),
        ([1, 2, 3, 4, 5], "reaches 5500 (channels 5, 4, 3 and 2 more, in 1 of 260 tokens)"),
    ],
)
def test_the_text_names_the_three_largest_channels(channels: list[int], named: str) -> None:
    model = load_model("demo")
    _plant(model, "blocks.1.mlp.act", channels, tokens=[0], images=slice(1))
    found = {massive.place: massive for massive in massive_activations(model)}["blocks.1.mlp.fc2"]
    assert list(found.channels) == channels[::-1]
    assert not found.stream
    assert str(found).startswith(f"{named} while 99.99% of it stays below ")


def test_channels_of_feature_maps_are_their_second_axis() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x.mean((2, 3)))

    module = Small().eval().requires_grad_(False)
    module.stem.__class__, module.head.__class__ = SitedConv2d, SitedLinear
    for layer in (module.stem, module.head):
        layer.input_site = layer.weight_site = layer.output_site = nn.Identity()

    def huge(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = inputs[0].clone()
        changed[0, 2, 5, 5] = 3000.0
        return (changed,)

    module.stem.register_forward_pre_hook(huge)
    preprocess = load_model("demo").preprocess
    (found,) = massive_activations(Model("small", module, preprocess, "", 2, None, ("head",)))
    assert (found.place, list(found.channels), found.tokens, found.of) == ("stem", [2], 1, 4 * 32 * 32)
