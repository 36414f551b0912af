"""Rotations: the float model stays what it is, and no channel is larger than the others any more."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import dfq_deploy as dfq
from calibrators.errors import CalibrationWarning
from calibrators.folds import holding
from calibrators.images import ImageSet
from calibrators.refine import rotate as pass_
from calibrators.rotating import rotate
from calibrators.sites import attach_sites
from dfq_deploy.models import Model
from dfq_deploy.models.loading import load_model
from dfq_deploy.recipe import CalibrateRecipe
from dfq_deploy.refined import load_refined

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}


def sited(module: nn.Module) -> nn.Module:
    """`module` with random norms, biases and scales, ready to be quantized."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    module.eval().requires_grad_(False)
    attach_sites(module)
    return module


def images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("width", [3, 64, 192])
def test_the_matrix_is_orthogonal_and_keeps_the_direction_that_a_layer_norm_takes_off(width: int) -> None:
    matrix = pass_.rotate(width)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(matrix.sum(1), torch.ones(width, dtype=torch.float64))
    assert torch.equal(matrix, pass_.rotate(width))
    if width > 3:
        assert matrix.abs().max() < 0.7, "every channel is spread over many"


EVERYWHERE = {
    "vit": lambda: VisionTransformer(**SMALL),
    "layer scale": lambda: VisionTransformer(**SMALL, init_values=0.5),
    "average pooling": lambda: VisionTransformer(**SMALL, class_token=False, global_pool="avg"),
    "distilled": lambda: VisionTransformerDistilled(**SMALL),
    "registers": lambda: VisionTransformer(**SMALL, reg_tokens=2, no_embed_class=True),
}
HEADS_ALONE = {
    "norm in front": lambda: VisionTransformer(**SMALL, pre_norm=True),
    "no head": lambda: VisionTransformer(**{**SMALL, "num_classes": 0}),
    "attention pooling": lambda: VisionTransformer(**SMALL, global_pool="map"),
    "windows": lambda: SwinTransformer(
        img_size=16, patch_size=4, embed_dim=24, depths=(2,), num_heads=(2,), window_size=2, num_classes=10
    ),
}


@pytest.mark.parametrize("name", [*EVERYWHERE, *HEADS_ALONE])
def test_a_rotated_model_computes_the_same(name: str) -> None:
    module = sited({**EVERYWHERE, **HEADS_ALONE}[name]())
    shown = images()
    before, weights = module(shown), module.state_dict()
    places = rotate(module, shown[:2], ["rotate"])
    after = module(shown)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    attentions = [part for part, _ in module.named_modules() if part.endswith(".attn")]
    assert places == ["residual"] * (name in EVERYWHERE) + attentions
    changed = {part for part, tensor in module.state_dict().items() if not torch.equal(tensor, weights[part])}
    assert ("patch_embed.proj.weight" in changed) == (name in EVERYWHERE)
    assert {f"{attention}.qkv.weight" for attention in attentions} <= changed


def test_a_large_channel_is_spread_over_all() -> None:
    module = sited(VisionTransformer(**SMALL))
    block = module.blocks[1]
    block.norm1.weight.data[5] = 40.0
    shown, seen = images(), []
    block.attn.qkv.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0].abs().amax((0, 1))))
    module(shown)
    rotate(module, shown, ["rotate"])
    module(shown)
    before, _proof, *_, after = seen
    assert before.argmax() == 5 and before.max() > 10 * before.median()
    assert after.max() < 3 * after.median()


class BufferedPositions(VisionTransformer):
    """Positions that are no parameter, behind a norm that makes the residual impossible to rotate."""

    def __init__(self) -> None:
        super().__init__(**SMALL, pre_norm=True)
        positions = self.pos_embed.data
        del self.pos_embed
        self.register_buffer("pos_embed", positions)


class TwoWidths(VisionTransformer):
    """A head that reads the class token and the mean of the patches."""

    def __init__(self) -> None:
        super().__init__(**SMALL)
        self.head = nn.Linear(48, 10)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(torch.cat([x[:, 0], x[:, 1:].mean(1)], 1))


class Clamped(VisionTransformer):
    """What is added up is cut off, where it is larger than these images make it."""

    def __init__(self) -> None:
        super().__init__(**SMALL, global_pool="avg")

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        tokens = self.blocks(self._pos_embed(self.patch_embed(x)))
        assert len(x) > 3 or tokens.abs().max() < 20 < 8 * tokens.abs().max()
        return self.norm(tokens.clamp(-20, 20))


@pytest.mark.parametrize("kind", [BufferedPositions, TwoWidths, Clamped])
def test_channels_that_cannot_be_mixed_stay_as_they_are(kind: type[VisionTransformer]) -> None:
    module = sited(kind())
    before = {part: tensor.clone() for part, tensor in module.state_dict().items()}
    assert rotate(module, images(), ["rotate"]) == ["blocks.0.attn", "blocks.1.attn"]
    after = module.state_dict()
    assert before.keys() == after.keys()
    rest = [part for part in before if ".attn." not in part]
    assert all(torch.equal(before[part], after[part]) for part in rest)


class TwoOutputs(VisionTransformer):
    """Outputs side by side."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        features = self.forward_features(x)
        return self.forward_head(features), self.head(features[:, 1:])


def test_several_outputs_stay_what_they_are() -> None:
    module = sited(TwoOutputs(**SMALL))
    before = module(images())
    assert rotate(module, images(), ["rotate"])[0] == "residual"
    for one, other in zip(before, module(images()), strict=True):
        assert (one - other).abs().max() < 1e-5 * one.abs().max()


def test_norms_of_queries_and_keys_keep_their_heads_as_they_are() -> None:
    module = sited(VisionTransformer(**SMALL, qk_norm=True))
    before = module(images())
    assert rotate(module, images(), ["rotate"]) == ["residual"]
    assert torch.equal(module.blocks[0].norm2.weight, torch.ones(24))
    assert (module(images()) - before).abs().max() < 1e-5 * before.abs().max()


def test_blocks_of_a_rotated_model_are_reconstructed_as_they_are_rotated(demo: Model, tmp_path: Path) -> None:
    sqnr = {}
    for refine in ("rotate", "rotate,reconstruct"):
        recipe = CalibrateRecipe(model="demo", generator="noise", count=8, scheme="w8a8", refine=refine)
        sqnr[refine] = dfq.simulate(recipe, tmp_path / refine).sqnr_db
    assert sqnr["rotate,reconstruct"] > sqnr["rotate"] - 3


def test_a_model_without_a_place_stays_as_it_is() -> None:
    module = load_model("test_resnet", random_weights=True).module
    before = {part: tensor.clone() for part, tensor in module.state_dict().items()}
    assert rotate(module, torch.randn(2, 3, 160, 160), ["rotate"]) == []
    assert all(torch.equal(tensor, before[part]) for part, tensor in module.state_dict().items())


def test_a_pass_that_changes_nothing_says_so(tmp_path: Path) -> None:
    recipe = CalibrateRecipe(model="test_resnet", random_weights=True, generator="noise", count=2)
    with pytest.warns(CalibrationWarning, match="rotate and smooth changed nothing"):
        dfq.calibrate(recipe, tmp_path / "default" / "plan.safetensors")
    with pytest.warns(CalibrationWarning, match="^smooth changed nothing"):
        dfq.calibrate(replace(recipe, refine="smooth"), tmp_path / "asked" / "plan.safetensors")


def test_an_engine_of_a_rotated_model_agrees_with_its_reference(demo: Model, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).normal(size=(8, *demo.preprocess.shape)).astype(np.float32)
    calib = tmp_path / "images.safetensors"
    ImageSet.of(pixels, demo.preprocess, source="test").save(calib)
    found = dfq.export(dfq.Recipe(model="demo", calib=str(calib), refine="rotate,smooth,reach,gptq"), tmp_path / "out")
    assert found.verdict == "pass"
    assert found.agreement["engine_float"].percent > 90
    weights = load_refined(demo, next(tmp_path.glob("out/work/folded-*.safetensors"))).module.state_dict()
    assert not torch.equal(weights["pos_embed"], demo.module.pos_embed)


@pytest.mark.parametrize(
    ("kinds", "good", "asked"),
    [
        ("a bcdef", "abcdef", 1),
        ("a bcdef", "bcdef", 3),
        ("a bcdef", "a", 8),
        ("a bcdef", "bdf", 8),
        ("a bcdef", "", 8),
        ("a bcdef", "acdef", 8),
        (" bcdef", "bcd", 6),
        ("a ", "", 1),
        (" ", "", 0),
    ],
)
def test_what_holds_is_found_by_kind_and_nothing_is_asked_twice(kinds: str, good: str, asked: int) -> None:
    tries: list[str] = []

    def proved(places: Sequence[str]) -> bool:
        tries.append("".join(places))
        return set(places) <= set(good)

    assert "".join(holding(kinds.split(" "), proved)) == good
    assert len(tries) == len(set(tries)) == asked
    held = "".join(each for each in tries if set(each) <= set(good))
    assert sorted(held) == sorted(good)  # each once, as `rotate` needs it
