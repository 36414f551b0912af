from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from timm.layers.attention import Attention
from timm.models.pit import PoolingVisionTransformer
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.volo import VOLO
from torch import nn

from calibrators.errors import ImagesError
from calibrators.images import ImageSet
from calibrators.preprocess import Preprocess
from dfq_deploy.generation.attention import rows_of, taps_with_rows
from dfq_deploy.generation.priors import attention_prior, patch_grid, rectangles, soft_labels
from dfq_deploy.generation.seen import attention_maps
from dfq_deploy.generation.taps import attention_taps
from dfq_deploy.models import Model
from dfq_deploy.models.loading import load_model

WINDOWED = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2,), "num_heads": (2,)}
PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 10}


@pytest.fixture(scope="module")
def demo() -> Model:
    return load_model("demo")


def shown(demo: Model, module: nn.Module) -> Model:
    """`module` with random norms, biases and tables, as a `Model` of 32 x 32 pixels."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim == 1 or parameter.shape[-1] == 2:
            nn.init.normal_(parameter, 0.5, 0.5)
    return replace(demo, module=module.eval().requires_grad_(False), name="tiny")


def images(count: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn((count, 3, size, size), generator=torch.Generator().manual_seed(0))


def attention_matrices(model: Model, shown: torch.Tensor) -> list[torch.Tensor]:
    """What the softmaxes put out where nothing is fused, (B * windows, heads, N, N) each."""
    found: list[torch.Tensor] = []
    dropouts = [m.attn_drop for m in model.module.modules() if hasattr(m, "attn_drop")]
    for module in model.module.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    handles = [drop.register_forward_hook(lambda _m, inputs, _out: found.append(inputs[0])) for drop in dropouts]
    with torch.no_grad():
        model.module(shown)
    for handle in handles:
        handle.remove()
    return found


MODULES = {
    "plain": lambda: VisionTransformer(**PLAIN),
    "qk_norm": lambda: VisionTransformer(**PLAIN, qk_norm=True),
    "registers": lambda: VisionTransformer(**PLAIN, reg_tokens=2),
    "average": lambda: VisionTransformer(**PLAIN, class_token=False, global_pool="avg"),
    "swin": lambda: SwinTransformer(**WINDOWED, num_classes=10),
    "swin2": lambda: SwinTransformerV2(**WINDOWED, num_classes=10),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_rows_are_those_of_the_attention_matrix(demo: Model, name: str, fused: bool) -> None:
    model = shown(demo, MODULES[name]())
    for module in model.module.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    taps = attention_taps(model)
    with torch.no_grad(), rows_of(taps) as rows:
        model.module(images())
        got = [rows.of(tap) for tap in taps]
    for tap, row, matrix in zip(taps, got, attention_matrices(model, images()), strict=True):
        queries = matrix[:, :, :1] if tap.prefix else matrix
        wanted = queries.mean(2)[..., tap.prefix :].unflatten(0, (3, tap.windows))
        assert row.shape == (3, tap.windows, tap.heads, tap.tokens)
        torch.testing.assert_close(row, wanted, atol=1e-6, rtol=1e-4)


class Around(nn.Module):
    """A model as a part of another one."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.backbone(pixels)


@pytest.mark.parametrize("name", MODULES)
def test_attention_is_the_same_where_its_model_is_a_part_of_another(demo: Model, name: str) -> None:
    alone = shown(demo, MODULES[name]())
    found = []
    for model in (alone, replace(alone, module=Around(alone.module))):
        taps = attention_taps(model)
        with torch.no_grad(), rows_of(taps) as rows:
            model.module(images())
            found.append([(tap, rows.of(tap)) for tap in taps])
    for (tap, row), (inner, same) in zip(*found, strict=True):
        assert inner == replace(tap, name=f"backbone.{tap.name}")
        assert inner.class_token == (name in ("plain", "qk_norm", "registers"))
        assert torch.equal(row, same)


@pytest.mark.parametrize(("name", "of"), [("registers", "class token"), ("average", "mean query")])
def test_a_map_of_a_model_in_another_says_whose_it_is(demo: Model, name: str, of: str) -> None:
    model = replace(demo, module=Around(shown(demo, MODULES[name]()).module))
    maps = attention_maps(model, ImageSet.of(images().numpy(), demo.preprocess, source="test"))
    assert (maps.of, maps.rows.shape) == (of, (3, 2, 4, 4))


def test_rows_of_rotated_queries_are_those_of_the_model() -> None:
    module = timm.create_model("vit_small_patch16_rope_224", depth=1, embed_dim=64, num_heads=2, num_classes=10)
    preprocess = Preprocess((224, 224), 1.0, "center", "bicubic", (0.5,) * 3, (0.5,) * 3)
    model = Model("rope", module.eval().requires_grad_(False), preprocess, "", 10, None, ("head",))
    (tap,) = attention_taps(model)
    with torch.no_grad(), rows_of([tap]) as rows:
        module(images(2, 224))
        got = rows.of(tap)
    (matrix,) = attention_matrices(model, images(2, 224))
    torch.testing.assert_close(got[:, 0], matrix[:, :, 0, 1:], atol=1e-6, rtol=1e-4)


def test_rows_carry_a_gradient_to_the_images(demo: Model) -> None:
    taps = attention_taps(demo)
    pixels = images(2).requires_grad_()
    with rows_of(taps) as rows:
        demo.module(pixels)
        rows.of(taps[-1])[..., 0].sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().max() > 0


def test_nothing_is_watched_after_the_block(demo: Model) -> None:
    taps = attention_taps(demo)
    with torch.no_grad(), rows_of(taps) as rows:
        demo.module(images(2))
        inside = rows.of(taps[0])
    with torch.no_grad():
        demo.module(images(3))
    assert torch.equal(rows.of(taps[0]), inside)
    assert not any(m._forward_hooks for m in demo.module.modules() if isinstance(m, Attention))


def test_attention_between_channels_is_refused() -> None:
    module = timm.create_model("xcit_nano_12_p16_224", depth=1, num_classes=10).eval().requires_grad_(False)
    preprocess = Preprocess((224, 224), 1.0, "center", "bicubic", (0.5,) * 3, (0.5,) * 3)
    model = Model("xcit", module, preprocess, "", 10, None, ("head",))
    with pytest.raises(ImagesError, match="no attention from token to token"):
        taps_with_rows(model, attention_taps(model))


def test_a_class_token_that_comes_later_takes_no_patch_away() -> None:
    module = timm.create_model("cait_xxs24_224", depth=1, num_classes=10).eval().requires_grad_(False)
    preprocess = Preprocess((224, 224), 1.0, "center", "bicubic", (0.5,) * 3, (0.5,) * 3)
    model = Model("cait", module, preprocess, "", 10, None, ("head",))
    assert [(tap.prefix, tap.tokens) for tap in attention_taps(model)] == [(0, 196)]


def test_a_class_token_is_found_by_its_name_and_is_in_no_grid(demo: Model) -> None:
    sizes = {"img_size": 32, "num_classes": 10}
    stages = {"base_dims": (8,) * 3, "depth": (1,) * 3, "heads": (2,) * 3}
    pit = shown(demo, PoolingVisionTransformer(patch_size=8, stride=4, **stages, **sizes))
    found = [(tap.prefix, tap.tokens, tap.class_token) for tap in attention_taps(pit)]
    assert found == [(1, 49, True), (1, 16, True), (1, 4, True)]
    stages = {"layers": (1, 1), "embed_dims": (16, 16), "num_heads": (2, 2)}
    volo = shown(demo, VOLO(**stages, downsamples=(True, False), outlook_attention=(True, False), **sizes))
    found = [(tap.prefix, tap.tokens, tap.class_token) for tap in attention_taps(volo)]
    assert found == [(0, 16, False), (0, 4, False)]


# What is drawn.


def test_a_prior_is_a_map_per_image_and_head(demo: Model) -> None:
    (tap, *_) = attention_taps(demo)
    prior = attention_prior(tap, 50, 1.0, torch.Generator().manual_seed(0))
    assert prior.shape == (50, 1, 4, 64)
    totals = prior.sum(-1).flatten()
    assert prior.min() >= 0
    assert totals.max() <= 1 + 1e-6
    assert totals.min() < 0.1 < 0.9 < totals.max()  # the class token's share is any
    assert len(prior.flatten(0, 2).unique(dim=0)) == 200
    # Mixtures of a few components are no flat maps, and their patches hang together.
    maps = (prior / prior.sum(-1, keepdim=True)).reshape(-1, 8, 8)
    assert (maps.amax((1, 2)) > 2 / 64).all()
    assert (maps[:, 1:] - maps[:, :-1]).square().sum() < 0.5 * 2 * maps.square().sum()


def test_a_prior_without_prefix_tokens_adds_up_to_one(demo: Model) -> None:
    taps = attention_taps(shown(demo, MODULES["swin"]()))
    prior = attention_prior(taps[0], 3, 1.0, torch.Generator().manual_seed(0))
    assert prior.shape == (3, 16, 2, 16)
    torch.testing.assert_close(prior.sum(-1), torch.ones(3, 16, 2))


@pytest.mark.parametrize(
    ("tokens", "aspect", "grid"), [(196, 1, (14, 14)), (50, 0.5, (5, 10)), (50, 2, (10, 5)), (7, 2, (7, 1))]
)
def test_patch_grid(tokens: int, aspect: float, grid: tuple[int, int]) -> None:
    assert patch_grid(tokens, aspect) == grid


def test_parts_lie_within_their_image_and_do_not_overlap() -> None:
    parts = rectangles(200, 4, (20, 30), torch.Generator().manual_seed(0)).numpy()
    covered = np.zeros((200, 20, 30), int)
    for image, top, bottom, left, right in parts:
        assert bottom - top >= 6 and right - left >= 9
        covered[image, top:bottom, left:right] += 1
    assert covered.max() == 1
    assert set(np.bincount(parts[:, 0])) == {1, 2, 3, 4}


def test_soft_labels_favour_what_is_present() -> None:
    present = torch.rand((40, 30), generator=torch.Generator().manual_seed(0)) < 0.1
    present[:, 0] = True
    labels = soft_labels(present, torch.Generator().manual_seed(1))
    torch.testing.assert_close(labels.sum(1), torch.ones(40))
    least = labels.masked_fill(~present, 1).amin(1)
    most = labels.masked_fill(present, 0).amax(1)
    assert (least > 50 * most).all()  # e^5 over e^1
    assert labels.masked_fill(~present, 0).max() < 1
