"""Sites: named places that change nothing until they are asked to, and attention written out as timm fuses it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers.attention import Attention
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

from calibrators.affine import CODES, fake_quantize
from calibrators.collectors import Subject
from calibrators.collectors.pytorch import collect_ranges
from calibrators.errors import PlanError
from calibrators.images import ImageSet
from calibrators.observers import MinMax
from calibrators.observing import observed
from calibrators.plan import QParams
from calibrators.preprocess import Preprocess
from calibrators.ranges import Ranges
from calibrators.sites import Mode, attach_sites, set_mode, sites_of
from dfq_deploy.models.families import swin, vit


def _vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit").eval()


def _swin() -> nn.Module:
    """Two stages of windows of 7: the second block of the first is shifted, hence masked."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 56, "window_size": 7, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4)}
    return SwinTransformer(**sizes, num_classes=5).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {"vit": (_vit, 160), "swin": (_swin, 56)}
every_model = pytest.mark.parametrize(("make", "edge"), MODELS.values(), ids=MODELS.keys())


def _sited(module: nn.Module) -> nn.Module:
    attach_sites(module)
    vit.attach_attention(module)
    swin.attach_attention(module)
    return module


def _images(edge: int, count: int = 3) -> Tensor:
    return torch.randn(count, 3, edge, edge, generator=torch.Generator().manual_seed(0))


def _drawn(module: nn.Module) -> nn.Module:
    """`module` with weights that make attention pick out tokens instead of averaging them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return module


@every_model
@torch.inference_mode()
def test_sites_that_are_off_change_neither_keys_nor_outputs(make: Callable[[], nn.Module], edge: int) -> None:
    module, images = _drawn(make()), _images(edge)
    keys, logits = list(module.state_dict()), module(images)
    _sited(module)
    assert list(module.state_dict()) == keys
    assert torch.equal(module(images), logits)
    assert len(sites_of(module)) > 20


@every_model
@torch.inference_mode()
def test_attention_written_out_equals_the_fused_kernel(make: Callable[[], nn.Module], edge: int) -> None:
    module, images = _sited(_drawn(make())), _images(edge)
    for attention in (layer for layer in module.modules() if hasattr(layer, "fused_attn")):
        attention.fused_attn = True  # timm leaves it off in Swin
    fused = module(images)
    set_mode(module, Mode.OBSERVE, observer=lambda _: MinMax())
    written_out = module(images)
    assert all(site.shape for site in sites_of(module).values() if site.role == "operand")  # they were at work
    torch.testing.assert_close(written_out, fused, rtol=1e-5, atol=1e-5)
    set_mode(module, Mode.OFF)
    assert torch.equal(module(images), fused)


@torch.inference_mode()
def test_the_mask_of_shifted_windows_is_kept() -> None:
    module, images = _sited(_drawn(_swin())), _images(56)
    set_mode(module, Mode.OBSERVE, observer=lambda _: MinMax())
    masked = module(images)
    shifted = module.get_submodule("layers.0.blocks.1")
    assert shifted.attn_mask is not None
    shifted.attn_mask = torch.zeros_like(shifted.attn_mask)
    assert (module(images) - masked).abs().max() > 1e-2


MASKS = ["all", "mask", "causal"]


@pytest.mark.parametrize(
    "variant",
    [
        {"qk_norm": True, "norm_layer": nn.LayerNorm},
        {"scale_norm": True, "norm_layer": nn.LayerNorm},
        {"gated": True, "qkv_bias": True},
        {"attn_head_dim": 4, "dim_out": 24, "proj_bias": False},
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(
    "call", [{"attn_mask": None}, {"attn_mask": torch.ones(5, 5).tril().bool()}, {"is_causal": True}], ids=MASKS
)
@torch.inference_mode()
def test_every_variant_of_timms_attention_is_written_out(variant: dict[str, Any], call: dict[str, Any]) -> None:
    module = nn.ModuleDict({"attn": Attention(16, num_heads=2, **variant)}).eval()
    tokens = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    fused = module["attn"](tokens, **call)
    vit.attach_attention(module)
    set_mode(module, Mode.OBSERVE, observer=lambda _: MinMax())
    torch.testing.assert_close(module["attn"](tokens, **call), fused, rtol=1e-5, atol=1e-5)


def test_names_say_where_a_site_stands() -> None:
    sites = sites_of(_sited(_vit()))
    assert all(site.name == name for name, site in sites.items())
    roles = {name: (site.role, site.axis) for name, site in sites.items()}
    block = {
        "blocks.3.attn.qkv.input": ("input", None),
        "blocks.3.attn.qkv.weight": ("weight", 0),
        "blocks.3.attn.qk.lhs": ("operand", None),
        "blocks.3.attn.qk.rhs": ("operand", None),
        "blocks.3.attn.av.lhs": ("operand", None),
        "blocks.3.attn.av.rhs": ("operand", None),
        "blocks.3.mlp.fc2.input": ("input", None),
    }
    stem = {"patch_embed.proj.input": ("input", None), "patch_embed.proj.output": ("output", None)}
    assert roles.items() >= (block | stem | {"head.weight": ("weight", 0)}).items()
    assert "head.output" not in roles


class _Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class _OwnAttention(Attention):
    pass


class _OwnWindowAttention(WindowAttention):
    pass


def test_a_subclass_with_a_forward_of_its_own_gets_no_site() -> None:
    own = [_Scaled(4, 4), _OwnAttention(4, 2), _OwnWindowAttention(4, num_heads=2, window_size=2)]
    module = _sited(nn.Sequential(*own, nn.Linear(4, 4)))
    kinds = [type(layer) for layer in module]
    assert kinds[:3] == [_Scaled, _OwnAttention, _OwnWindowAttention]
    layers = {name.rpartition(".")[0] for name in sites_of(module)}
    assert layers == {"1.qkv", "1.proj", "2.qkv", "2.proj", "3"}


def _linear() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 4))
    attach_sites(module)
    return module, torch.randn(5, 6)


@torch.inference_mode()
def test_observing_sees_inputs_and_weights_and_changes_nothing() -> None:
    module, x = _linear()
    plain = module(x)
    set_mode(module, Mode.OBSERVE, observer=lambda _: MinMax())
    assert torch.equal(module(x), plain)
    sites = sites_of(module)
    assert {name: site.shape for name, site in sites.items()} == {"0.input": (5, 6), "0.weight": (4, 6)}
    assert [sites["0.input"].observer.range()] == [(x.min(), x.max())]
    np.testing.assert_array_equal(sites["0.weight"].observer.range()[1], module[0].weight.amax(1))


@torch.inference_mode()
def test_faking_rounds_what_the_plan_names_and_nothing_else() -> None:
    module, x = _linear()
    plain, weight, bias = module(x), module[0].weight, module[0].bias
    step, zero = torch.tensor(0.1), torch.tensor(0.0)
    coarse = QParams(np.array(0.1, np.float32), np.array(0, np.int8), CODES["int8"], None)
    steps = np.array([0.01, 0.02, 0.03, 0.04], np.float32)
    per_channel = QParams(steps, np.zeros(4, np.int8), CODES["int8"], 0)
    set_mode(module, Mode.FAKE, qparams={"0.input": coarse})
    rounded = fake_quantize(x, step, zero, CODES["int8"])
    assert torch.equal(module(x), F.linear(rounded, weight, bias))
    set_mode(module, Mode.FAKE, qparams={"0.weight": per_channel})
    rounded = fake_quantize(weight, torch.from_numpy(steps)[:, None], zero, CODES["int8"])
    assert torch.equal(module(x), F.linear(x, rounded, bias))
    set_mode(module, Mode.FAKE, qparams={})
    assert torch.equal(module(x), plain)
    set_mode(module, Mode.OFF)
    assert torch.equal(module(x), plain)


@torch.inference_mode()
def test_a_convolution_is_rounded_at_its_input_weight_and_output() -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1))
    attach_sites(module)
    x = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    whole = QParams(np.array(1, np.float32), np.array(0, np.int8), CODES["int8"], None)
    set_mode(module, Mode.FAKE, qparams=dict.fromkeys(["0.input", "0.weight", "0.output"], whole))
    assert torch.equal(module(x), F.conv2d(x.round(), module[0].weight.round(), module[0].bias, padding=1).round())


def _image_set(edge: int, count: int = 3) -> ImageSet:
    preprocess = Preprocess((edge, edge), 1.0, "center", "bicubic", (0.5,) * 3, (0.5,) * 3)
    return ImageSet.of(_images(edge, count).numpy(), preprocess, source="test")


def _collected(module: nn.Module, edge: int) -> Ranges:
    return collect_ranges(Subject(module, "m"), _image_set(edge), observer="minmax", percentile=99.9, codes=None)


@every_model
def test_collected_ranges_hold_every_site_and_fix_that_of_softmax(make: Callable[[], nn.Module], edge: int) -> None:
    module = _sited(_drawn(make()))
    ranges = _collected(module, edge)
    assert list(ranges.sites) == list(sites_of(module))
    softmaxes = [seen for name, seen in ranges.sites.items() if name.endswith(".av.lhs")]
    assert {(float(seen.low), float(seen.high)) for seen in softmaxes} == {(0, 1)}
    assert len(softmaxes) == (6 if make is _vit else 3)
    assert (ranges.model, ranges.observer) == ("m", "minmax")
    assert all(site.mode is Mode.OFF for site in sites_of(module).values())


def test_collected_shapes_leave_the_batch_out_of_activations() -> None:
    sites = _collected(_sited(_vit()), 160).sites
    assert sites["patch_embed.proj.input"].shape == (3, 160, 160)
    assert sites["head.weight"].shape == (1000, 64)


def test_collecting_is_the_same_in_any_batch_size() -> None:
    module = _sited(_drawn(_swin()))
    one, three = (observed(module, _image_set(56), lambda _: MinMax(), batch_size=size) for size in (1, 3))
    for name, seen in one.items():
        np.testing.assert_allclose(three[name].low, seen.low, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(three[name].high, seen.high, rtol=1e-4, err_msg=name)


def test_a_layer_that_the_model_never_runs_has_no_range() -> None:
    module = _sited(_vit())
    module.add_module("idle", nn.Linear(2, 2))
    attach_sites(module)
    assert "idle.input" not in _collected(module, 160).sites


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        ("bias", r"site `blocks\.2\.mlp\.fc2\.input`: the values for image 0 "),
        ("weight", r"site `blocks\.2\.mlp\.fc1\.weight`: the values hold"),
    ],
)
def test_a_site_that_nan_passes_is_named_and_all_are_off_again(bad: float, tensor: str, named: str) -> None:
    module = _sited(_vit())
    with torch.no_grad():
        getattr(module.get_submodule("blocks.2.mlp.fc1"), tensor)[0] = bad
    with pytest.raises(PlanError, match=named):
        _collected(module, 160)
    assert all(site.mode is Mode.OFF for site in sites_of(module).values())


@pytest.mark.parametrize(("window", "image"), [(0, 2), (3, 2), (4, 3), (7, 3)])
def test_the_image_that_inf_comes_from_is_named_in_windows_too(window: int, image: int) -> None:
    module = _sited(_swin())
    windows: list[Tensor] = []

    def spoil(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        windows.append(inputs[0].clone())  # (2 images of 4 windows, 49 tokens, 16 channels)
        if len(windows) == 2:
            windows[1][window, 3, 1] = np.inf
        return (windows[-1],)

    module.get_submodule("layers.0.blocks.0.attn").register_forward_pre_hook(spoil)
    with pytest.raises(PlanError, match=rf"`layers\.0\.blocks\.0\.attn\.qkv\.input`: .* image {image} of test"):
        observed(module, _image_set(56, 6), lambda _: MinMax(), batch_size=2)
    assert [len(batch) for batch in windows] == [8, 8], "nothing runs after that"
