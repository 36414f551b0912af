"""Which layers are left in float, scheme by scheme, and that noise is enough to find them."""

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from calibrators.scheme import SCHEMES
from dfq_deploy.models import Model
from dfq_deploy.models.loading import load_model
from dfq_deploy.sparing import layers_to_spare

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
        assert found["blocks.2.attn.qkv"].startswith("its input reaches 1000 while 99.99% of it stays below ")


@pytest.mark.parametrize("scheme", _ROUNDED)
def test_a_layer_whose_input_is_the_same_for_all_images_is_spared(demo: Model, scheme: str) -> None:
    _change_input(demo, "blocks.1.mlp.fc1", lambda values: values[:1])
    found = layers_to_spare(demo, SCHEMES[scheme], first_layer=True)
    constant = "its input does not depend on the image"
    assert {layer for layer, reason in found.items() if reason == constant} == {"blocks.1.mlp.fc1", "blocks.1.mlp.fc2"}


def test_looking_leaves_no_hooks_behind(demo: Model) -> None:
    layers_to_spare(demo, SCHEMES["w8a8"], first_layer=False)
    assert not any(layer._forward_pre_hooks for layer in demo.module.modules())
