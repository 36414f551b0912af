"""Block reconstruction: blocks found by structure, a loss that falls, weights on their codes."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from calibrators.affine import CODES, choose_qparams, fake_quantize
from calibrators.blocks import blocks_of, reconstruct
from calibrators.errors import PlanError
from calibrators.images import ImageSet
from calibrators.learned import Learned
from calibrators.observers import MinMax
from calibrators.observing import observed
from calibrators.plan import QParams, make_plan
from calibrators.preprocess import Preprocess
from calibrators.ranges import Ranges
from calibrators.refine import reconstruct as the_pass
from calibrators.scheme import scheme_named
from calibrators.sites import Mode, SitedLinear, attach_sites, rounded, set_mode
from dfq_deploy.models import Model
from dfq_deploy.refined import copy_of


@pytest.fixture(scope="module")
def images(demo: Model) -> ImageSet:
    pixels = np.random.default_rng(0).normal(size=(16, *demo.preprocess.shape)).astype(np.float32)
    return ImageSet.of(pixels, demo.preprocess, source="test")


@pytest.fixture(scope="module")
def plan(demo: Model, images: ImageSet) -> dict[str, QParams]:
    """W4A4 for the demo, from the extremes that were seen."""
    ranges = Ranges(observed(demo.module, images, lambda _: MinMax()), "m", "i", "minmax")
    return dict(make_plan(ranges, scheme_named("w4a4"), attention=True).sites)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(the_pass, "_STEPS", 12)
    monkeypatch.setattr(the_pass, "_BATCH", 16)  # all of them: the loss is not of other images in each step


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("vit_tiny_patch16_224", {}, [f"blocks.{i}" for i in range(12)]),
        ("deit_tiny_distilled_patch16_224", {"depth": 2}, ["blocks.0", "blocks.1"]),
        (
            "swin_tiny_patch4_window7_224",
            {"depths": (2, 1), "num_heads": (3, 6)},
            ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"],
        ),
        ("resnet18", {}, []),
    ],
)
def test_blocks_are_found_by_structure(name: str, options: dict[str, object], wanted: list[str]) -> None:
    module = timm.create_model(name, **options)
    attach_sites(module)
    assert list(blocks_of(module)) == wanted


def _logits(module: nn.Module, images: ImageSet, plan: dict[str, QParams] | None = None) -> Tensor:
    set_mode(module, Mode.FAKE, qparams=plan)
    with torch.inference_mode():
        found: Tensor = module(torch.from_numpy(images.pixels[:]))
    set_mode(module, Mode.OFF)
    return found


@pytest.mark.usefixtures("quick")
def test_the_loss_falls_and_the_float_model_stays(demo: Model, images: ImageSet, plan: dict[str, QParams]) -> None:
    before = {name: value.clone() for name, value in demo.module.state_dict().items()}
    model = copy_of(demo)
    losses: list[tuple[float, float]] = []
    settled = reconstruct(
        model.module,
        demo.module,
        plan,
        images,
        ["reconstruct"],
        lambda done, total, terms: losses.append((terms["first"], terms["last"])),
    )
    assert len(losses) == 4
    assert all(last < first for first, last in losses)
    wanted = _logits(demo.module, images)
    rounded, learned = (_logits(m, images, p) for m, p in ((demo.module, plan), (model.module, settled)))
    assert (learned - wanted).norm() < 0.9 * (rounded - wanted).norm()
    assert all(torch.equal(value, before[name]) for name, value in demo.module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert settled.keys() == plan.keys()
    assert not np.array_equal(settled["blocks.0.mlp.fc1.input"].scale, plan["blocks.0.mlp.fc1.input"].scale)
    assert settled["head.weight"] is plan["head.weight"], "it is in no block"


@pytest.mark.usefixtures("quick")
def test_what_comes_out_lies_on_the_codes_and_is_the_same_again(
    demo: Model, images: ImageSet, plan: dict[str, QParams]
) -> None:
    models = [copy_of(demo), copy_of(demo)]
    plans = [reconstruct(m.module, demo.module, plan, images, ["reconstruct"]) for m in models]
    for name, layer in models[0].module.named_modules():
        if isinstance(layer, SitedLinear) and name.startswith("blocks."):
            site = plans[0][f"{name}.weight"]
            scale, zero = map(torch.from_numpy, site.along(2))
            assert torch.allclose(fake_quantize(layer.weight, scale, zero, site.codes), layer.weight, atol=1e-6)
            assert len((layer.weight[0] / scale[0]).round().unique()) <= 16
    for site, one in plans[0].items():
        np.testing.assert_array_equal(one.scale, plans[1][site].scale, strict=True)
        np.testing.assert_array_equal(one.zero_point, plans[1][site].zero_point, strict=True)
        assert (one.scale.dtype, one.zero_point.dtype) == (np.float32, one.codes.zero_dtype)
    again = models[1].module.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in models[0].module.state_dict().items())


def test_blocks_in_stages_with_windows_are_reconstructed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(the_pass, "_STEPS", 2)
    small = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4), "num_classes": 4}
    torch.manual_seed(0)
    floats = timm.create_model("swin_tiny_patch4_window7_224", **small).eval().requires_grad_(False)
    attach_sites(floats)
    torch.manual_seed(0)
    module = timm.create_model("swin_tiny_patch4_window7_224", **small).eval().requires_grad_(False)
    attach_sites(module)
    pixels = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    three = (0.5,) * 3
    images = ImageSet.of(pixels, Preprocess((32, 32), 1.0, "center", "bicubic", three, three), source="test")
    ranges = Ranges(observed(module, images, lambda _: MinMax()), "m", "i", "minmax")
    plan = make_plan(ranges, scheme_named("w6a6"), attention=True).sites
    settled = reconstruct(module, floats, plan, images, ["reconstruct"])
    changed = [n for n, v in module.state_dict().items() if not torch.equal(v, floats.state_dict()[n])]
    assert {n.split(".blocks.")[0] for n in changed} == {"layers.0", "layers.1"}
    assert settled["layers.1.downsample.reduction.weight"] is plan["layers.1.downsample.reduction.weight"]
    assert torch.isfinite(module(torch.from_numpy(pixels))).all()


def test_a_model_without_blocks_is_told() -> None:
    module = timm.create_model("resnet18", num_classes=4).eval()
    attach_sites(module)
    three = (0.5,) * 3
    pixels = np.zeros((2, 3, 32, 32), np.float32)
    images = ImageSet.of(pixels, Preprocess((32, 32), 1.0, "center", "bicubic", three, three), source="test")
    with pytest.raises(PlanError, match="reconstruct finds no blocks") as caught:
        reconstruct(module, module, {}, images, ["reconstruct"])
    assert "--refine" in caught.value.fix


class _Beside(nn.Module):
    """One block, which takes a second tensor beside its tokens."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, tokens: Tensor, beside: Tensor, pair: bool = False) -> Tensor | tuple[Tensor, Tensor]:
            found = self.two(self.one(tokens)) + beside.mean(0)
            return (found, beside) if pair else found

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.blocks, self.place = kind, nn.ModuleList([self.Block()]), nn.Parameter(torch.ones(8, 3, 4))

    def forward(self, images: Tensor) -> Tensor:
        block, tokens = self.blocks[0], images.reshape(-1, 3, 4)
        if self.kind == "puts out two":
            return block(tokens, self.place, pair=True)[0]
        if self.kind == "by keyword":
            return block(tokens, beside=tokens.cos())
        return block(tokens, tokens.cos() if self.kind == "takes two" else self.place)


def _reconstructed(kind: str) -> dict[str, QParams]:
    torch.manual_seed(0)
    module = _Beside(kind).eval().requires_grad_(False)
    attach_sites(module)
    three = (0.5,) * 3
    pixels = np.random.default_rng(0).normal(size=(12, 3, 2, 2)).astype(np.float32)
    images = ImageSet.of(pixels, Preprocess((2, 2), 1.0, "center", "bicubic", three, three), source="test")
    ranges = Ranges(observed(module, images, lambda _: MinMax()), "m", "i", "minmax")
    plan = make_plan(ranges, scheme_named("w8a8")).sites
    return reconstruct(module, copy.deepcopy(module), plan, images, ["reconstruct"])


@pytest.mark.parametrize("kind", ["puts out two", "takes two", "by keyword"])
def test_a_block_with_two_tensors_of_the_images_is_refused_by_name(kind: str) -> None:
    with pytest.raises(PlanError, match=r"the block `blocks\.0` cannot be reconstructed") as caught:
        _reconstructed(kind)
    assert caught.value.fix == "leave `reconstruct` out of --refine."


@pytest.mark.usefixtures("quick")
def test_a_block_may_take_what_is_the_same_for_all_images() -> None:
    assert len(_reconstructed("for all")) == 4


def test_gradients_of_rounding_are_those_of_learned_steps() -> None:
    """Within the range 1 to the values and the rounding error to the scale; beyond it 0 and the last code."""
    layer = nn.Sequential(nn.Linear(4, 1, bias=False))
    attach_sites(layer)
    codes = CODES["uint4"]
    site = QParams(np.asarray(0.5, np.float32), np.asarray(4, np.uint8), codes, None)
    learned = Learned(layer, {"0.input": site})
    values = torch.tensor([[0.6, -0.3, 9.0, -9.0]], requires_grad=True)
    found: Tensor = layer[0].input_site(values)
    assert torch.allclose(found, torch.tensor([[0.5, -0.5, 5.5, -2.0]]))
    (found * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[1.0, 10.0, 0.0, 0.0]]
    scale, zero = learned.scales["0.input"].grad, learned.zeros["0.input"].grad
    assert scale is not None and zero is not None
    assert scale == pytest.approx(1 * (1 - 1.2) + 10 * (-1 + 0.6) + 100 * 11 + 1000 * -4, rel=1e-5)
    assert zero == pytest.approx(-0.5 * (100 + 1000))
    learned.scales["0.input"].data.fill_(0.25)
    learned.zeros["0.input"].data.fill_(5.4)
    settled = learned.settle()["0.input"]
    assert (settled.scale, settled.zero_point) == (0.25, 5)
    assert replace(settled, scale=site.scale, zero_point=site.zero_point) == site


def test_a_dynamic_site_rounds_to_what_passes_and_stays_as_it_was() -> None:
    layer = nn.Sequential(nn.Linear(4, 1, bias=False))
    attach_sites(layer)
    site = QParams(np.asarray(0.5, np.float32), np.asarray(4, np.uint8), CODES["uint8"], None, dynamic=True)
    learned = Learned(layer, {"0.input": site})
    values = torch.tensor([[0.6, -0.3, 900.0, -9.0]], requires_grad=True)
    found: Tensor = layer[0].input_site(values)
    torch.testing.assert_close(found, rounded(values.detach(), site))
    assert found[0, 2] > 800
    found.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[1.0] * 4]
    assert not learned.scales and not learned.zeros
    assert learned.settle()["0.input"] is site


def test_weights_have_a_scale_per_row() -> None:
    layer = nn.Sequential(nn.Linear(3, 2, bias=False))
    attach_sites(layer)
    low, high = np.float32([-1, -2]), np.float32([1, 1])
    site = QParams(*choose_qparams(low, high, CODES["int4"]), CODES["int4"], 0)
    learned = Learned(layer, {"0.weight": site})
    layer(torch.ones(1, 3)).sum().backward()
    gradient = learned.scales["0.weight"].grad
    assert gradient is not None and gradient.shape == (2, 1)
    assert not learned.zeros
    learned.settle()
    steps = layer[0].weight / torch.from_numpy(site.scale)[:, None]
    assert torch.allclose(steps, steps.round(), atol=1e-5)


def test_blocks_of_a_row_have_a_scale_each() -> None:
    layer = nn.Sequential(nn.Linear(6, 2, bias=False))
    attach_sites(layer)
    weights = layer[0].weight.detach().numpy().reshape(2, 3, 2)
    site = QParams(*choose_qparams(weights.min(2), weights.max(2), CODES["uint4"]), CODES["uint4"], 0, 2)
    learned = Learned(layer, {"0.weight": site})
    layer(torch.ones(1, 6)).sum().backward()
    gradient = learned.scales["0.weight"].grad
    assert gradient is not None and gradient.shape == (2, 3)
    settled = learned.settle()["0.weight"]
    assert settled.scale.shape == settled.zero_point.shape == (2, 3)
    np.testing.assert_array_equal(settled.scale, settled.scale.astype(np.float16), err_msg="float16 cannot hold them")
    steps = layer[0].weight / torch.from_numpy(np.repeat(settled.scale, 2, 1))
    assert torch.allclose(steps, steps.round(), atol=1e-5)


def test_scales_that_are_not_learned_pass_the_same_gradient(
    demo: Model, images: ImageSet, plan: dict[str, QParams]
) -> None:
    gradients = []
    for fixed in (False, True):
        module = copy_of(demo).module
        learned = Learned(module, plan)
        for part in (*learned.scales.values(), *learned.zeros.values()):
            part.requires_grad_(part.requires_grad and not fixed)
        weights = [module.blocks[1].mlp.fc1.weight, module.patch_embed.proj.weight]
        gradients.append(torch.autograd.grad(module(torch.from_numpy(images.pixels[:4])).square().sum(), weights))
    for first, second in zip(*gradients, strict=True):
        assert first.abs().max() > 0
        torch.testing.assert_close(first, second)


def test_rounding_is_in_float32_whatever_arrives(demo: Model, plan: dict[str, QParams]) -> None:
    module = copy_of(demo).module
    Learned(module, plan)
    site = module.blocks[1].mlp.fc1.input_site
    values = torch.linspace(-2, 2, 64)
    rounded = site(values.bfloat16())
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded, site(values.bfloat16().float()).bfloat16())
