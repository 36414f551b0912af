"""Refine passes: folds that leave the float model alone, and corrections that lessen the error they are for."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

import dfq_deploy as dfq
from calibrators.affine import CODES, choose_qparams
from calibrators.errors import BundleError, CalibrationWarning, PlanError, RecipeError
from calibrators.folds import find_folds, layers_of
from calibrators.images import ImageSet
from calibrators.importance import token_importance, token_weights
from calibrators.plan import QParams
from calibrators.preprocess import Preprocess
from calibrators.refine import Layer, Seen, bias, clip, gptq, reach, reparam, ridge, smooth
from calibrators.refining import correct, kind_of, transform
from calibrators.registry import names
from calibrators.scheme import scheme_named
from calibrators.sites import Mode, attach_sites, set_mode, sites_of
from dfq_deploy.models import Model
from dfq_deploy.models.loading import load_model
from dfq_deploy.refined import copy_of, load_refined, load_scales, save_refined

_TRANSFORMS = [name for name in names("calibrators.refine") if kind_of(name) == "transform"]


@pytest.fixture(scope="module")
def images(demo: Model) -> ImageSet:
    pixels = np.random.default_rng(0).normal(size=(8, *demo.preprocess.shape)).astype(np.float32)
    return ImageSet.of(pixels, demo.preprocess, source="test")


def _layer(codes: str = "int4", width: int = 32, tokens: int = 512, block: int | None = None) -> Layer:
    """A layer whose inputs are correlated and one-sided, rounded to INT8."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator)
    arriving = nn.functional.gelu(torch.randn(tokens, width, generator=generator) @ mixing)
    weight = torch.randn(16, width, generator=generator)
    offset = torch.randn(16, generator=generator)
    shape = (16, width // block) if block else (16,)
    qparams = QParams(np.ones(shape, np.float32), np.zeros(shape, np.int8), CODES[codes], 0, block)
    scale, zero = choose_qparams(*(np.asarray(end) for end in arriving.aminmax()), CODES["int8"])
    layer = Layer(
        weight=weight,
        bias=offset,
        qparams=qparams,
        input_qparams=QParams(scale, zero, CODES["int8"], None),
        name="layer",
        arriving=arriving,
        wanted=arriving @ weight.T + offset,
        importance=torch.rand(tokens, generator=generator) * 2,
        images=4,
    )
    layer.cover()
    return layer


def _error(layer: Layer, *, weighed: bool = False) -> float:
    assert layer.bias is not None
    errors = layer.inputs @ layer.rounded().T + layer.bias - layer.wanted
    return float((errors.square().sum(1) * (layer.importance if weighed else 1)).sum())


def _rounding_error(layer: Layer) -> Tensor:
    """Of each block of the weight, channels counted by the power of their inputs."""
    power = layer.weighed.square().mean(0)
    return ((layer.rounded() - layer.weight).square() * power).reshape(layer.groups.shape).sum(1)


@pytest.mark.parametrize("name", _TRANSFORMS)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_a_transform_leaves_the_float_model_as_it_was_and_changes_weights(
    demo: Model, images: ImageSet, name: str, scheme: str
) -> None:
    changed = copy_of(demo)
    folds = transform(changed.module, images, [name], scheme_named(scheme), (32,) if scheme == "w4a16" else ())
    assert len(folds) == 12  # of four blocks: norm1, V and norm2
    probe = torch.from_numpy(images.pixels[:])
    with torch.inference_mode():
        before, after = demo.module(probe), changed.module(probe)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    moved = [(layers_of(demo.module)[f].weight - layers_of(changed.module)[f].weight).abs().max() for f in folds]
    assert max(moved) > 1e-3


def test_folds_of_windowed_attention_are_found_through_the_shuffled_tokens() -> None:
    torch.manual_seed(0)
    module = SwinTransformer(
        img_size=32, patch_size=4, embed_dim=16, depths=(2,), num_heads=(2,), window_size=4, num_classes=4
    )
    module.eval().requires_grad_(False)
    attach_sites(module)
    folds = find_folds(module, torch.randn(2, 3, 32, 32))
    blocks = [f"layers.0.blocks.{block}" for block in range(2)]  # the second one's windows are shifted
    wanted = [f"{block}.{layer}" for block in blocks for layer in ("attn.qkv", "attn.proj", "mlp.fc1")]
    assert [fold.name for fold in folds] == wanted


class _Shared(nn.Module):
    """What the LayerNorm puts out goes on by another way, too: nothing can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.one = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        return (self.one(tokens) + tokens).mean(1)


def test_an_activation_that_somebody_else_reads_is_no_fold() -> None:
    module = _Shared().eval().requires_grad_(False)
    attach_sites(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert find_folds(module, torch.randn(2, 8, 4, 4)) == []
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_transform_that_changes_the_function_is_refused_and_undone(
    demo: Model, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy_of(demo)
    monkeypatch.setattr(reparam, "transform", lambda seen: (seen.low, torch.zeros_like(seen.low)))
    with pytest.raises(PlanError, match="would change what the float model computes"):
        transform(model.module, images, ["reparam"], scheme_named("w8a8"), ())
    state = demo.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.module.state_dict().items())


def test_in_front_of_a_projection_a_transform_sees_how_far_v_reaches(
    demo: Model, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, told = copy_of(demo), list[Seen]()

    def look(seen: Seen) -> tuple[Tensor, Tensor]:
        told.append(seen)
        return torch.zeros_like(seen.low), torch.ones_like(seen.low)

    monkeypatch.setattr(smooth, "transform", look)
    folds = transform(copied.module, images, ["smooth"], scheme_named("w8a8"), ())
    seen = told[folds.index("blocks.0.attn.proj")]
    values: list[Tensor] = []
    layers_of(copied.module)["blocks.0.attn.qkv"].register_forward_hook(lambda *call: values.append(call[2][..., 128:]))
    with torch.inference_mode():
        copied.module(torch.from_numpy(images.pixels[:]))
    assert torch.allclose(seen.high, values[0].flatten(0, 1).amax(0))
    assert torch.allclose(seen.low, values[0].flatten(0, 1).amin(0))
    assert (seen.high > seen.rows.amax(0)).all()


def test_images_of_a_last_batch_that_is_not_full_count_as_others(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def look(seen: Seen) -> tuple[Tensor, Tensor]:
        rows.append(len(seen.rows))
        return torch.zeros_like(seen.low), torch.ones_like(seen.low)

    twenty = np.random.default_rng(0).normal(size=(20, *demo.preprocess.shape)).astype(np.float32)
    monkeypatch.setattr(smooth, "transform", look)
    monkeypatch.setattr("calibrators.refining._ROWS", 130)
    few = ImageSet.of(twenty, demo.preprocess, source="test")
    transform(copy_of(demo).module, few, ["smooth"], scheme_named("w8a8"), ())
    assert set(rows) == {130}, "every tenth of 20 times 65 tokens, in batches of 16 and 4 images"


def test_smooth_lessens_the_error_where_one_channel_is_large() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(256, 16, generator=generator)
    rows[:, 3] *= 50
    int8 = CODES["int8"]
    seen = Seen(rows, rows.amin(0), rows.amax(0), torch.randn(8, 16, generator=generator), int8, int8, None)
    _, factors = smooth.transform(seen)
    assert factors[3] > 3 * factors[torch.arange(16) != 3].max()
    assert torch.isclose(factors.log().mean(), torch.tensor(0.0), atol=1e-5)


def test_smooth_centres_channels_that_lie_on_one_side() -> None:
    rows = torch.rand(256, 16, generator=torch.Generator().manual_seed(0)) + 3
    int8 = CODES["int8"]
    seen = Seen(rows, rows.amin(0), rows.amax(0), torch.ones(8, 16), int8, int8, None)
    offsets, _ = smooth.transform(seen)
    assert torch.allclose(offsets, (seen.low + seen.high) / 2)
    alone, _ = smooth.transform(replace(seen, activation=None))
    assert not alone.any()


def test_smooth_gives_weights_finer_steps_where_inputs_are_large() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(256, 16, generator=generator)
    rows[:, 3] *= 50
    weights = torch.randn(8, 16, generator=generator)
    _, factors = smooth.transform(Seen(rows, rows.amin(0), rows.amax(0), weights, None, CODES["int4"], None))
    assert factors[3] > 2 * factors[torch.arange(16) != 3].max()


def test_a_model_that_cannot_be_folded_stays_as_it_is() -> None:
    module = _Shared().eval().requires_grad_(False)
    attach_sites(module)
    pixels = np.random.default_rng(0).normal(size=(2, 8, 4, 4)).astype(np.float32)
    eight = (0.5,) * 8
    few = ImageSet.of(pixels, Preprocess((4, 4), 1.0, "center", "bicubic", eight, eight), source="test")
    before = {part: tensor.clone() for part, tensor in module.state_dict().items()}
    assert transform(module, few, ["smooth"], scheme_named("w8a8"), ()) == []
    assert all(torch.equal(tensor, before[part]) for part, tensor in module.state_dict().items())


def test_reparam_centres_every_channel_and_makes_their_ranges_equal() -> None:
    rows = torch.rand(64, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 9.0) + 5
    int8 = CODES["int8"]
    offsets, factors = reparam.transform(Seen(rows, rows.amin(0), rows.amax(0), torch.ones(1, 8), int8, int8, None))
    moved = (rows - offsets) / factors
    assert torch.allclose(moved.amin(0), -moved.amax(0), atol=1e-5)
    assert torch.allclose(moved.amax(0), moved.amax(0).mean().expand(8), atol=1e-5)


@pytest.mark.parametrize("block", [None, 16])
def test_gptq_puts_weights_on_their_codes_with_less_error_than_rounding(block: int | None) -> None:
    layer = _layer(block=block)
    before, kept = _error(layer, weighed=True), layer.weight.clone()
    gptq.correct(layer)
    assert torch.allclose(layer.weight, layer.rounded(), atol=1e-6)
    assert not torch.equal(layer.weight, replace(layer, weight=kept).rounded())
    assert _error(layer, weighed=True) < 0.9 * before


def test_gptq_warns_of_few_tokens_and_then_hardly_departs_from_rounding() -> None:
    layer = _layer(width=64, tokens=8)
    rounding = layer.rounded()
    with pytest.warns(CalibrationWarning, match="8 tokens of 4 images are few for 64 input channels"):
        gptq.correct(layer)
    assert (layer.weight != rounding).float().mean() < 0.2


def test_clip_chooses_for_each_block_the_least_error() -> None:
    layer = _layer(block=16)
    covered = layer.qparams.scale.copy()
    before = _rounding_error(layer)
    clip.correct(layer)
    assert layer.qparams.scale.shape == covered.shape
    assert (_rounding_error(layer) <= before).all()
    assert (_rounding_error(layer) < before).float().mean() > 0.5


def test_bias_makes_the_mean_output_right() -> None:
    layer = _layer()
    bias.correct(layer)
    assert layer.bias is not None
    mean = (layer.inputs @ layer.rounded().T + layer.bias).mean(0)
    assert torch.allclose(mean, layer.wanted.mean(0), atol=1e-3)


def test_ridge_lessens_the_error_of_coarse_inputs() -> None:
    layer = _layer("int8")
    assert layer.input_qparams is not None
    layer.input_qparams = replace(layer.input_qparams, scale=np.asarray(layer.input_qparams.scale * 16))
    before = _error(layer)
    ridge.correct(layer)
    assert _error(layer) < before


def test_reach_cuts_off_the_tail_of_a_one_sided_input_and_widens_a_two_sided_one() -> None:
    one_sided = _layer("int8")
    one_sided.arriving[0, 0] = 3 * one_sided.arriving.max()
    one_sided.weight[:, 0] *= 0.01
    two_sided = replace(one_sided, arriving=torch.randn(512, 32, generator=torch.Generator().manual_seed(0)))
    for layer in (one_sided, two_sided):
        reach.correct(layer)
    assert one_sided.input_qparams is not None and two_sided.input_qparams is not None
    assert one_sided.input_qparams.scale < 0.9 * float(one_sided.arriving.max()) / 127
    assert np.isclose(two_sided.input_qparams.scale, 1.1 * float(two_sided.arriving.abs().max()) / 127)


def test_reach_keeps_the_tail_of_tokens_that_matter() -> None:
    layer = _layer("int8", tokens=4096)
    layer.arriving[7, 0] = 3 * layer.arriving.max()
    layer.weight[:, 0] *= 0.01
    matters = replace(layer, importance=torch.zeros(4096))
    matters.importance[7] = 4096
    for one in (layer, matters):
        reach.correct(one)
    assert layer.input_qparams is not None and matters.input_qparams is not None
    assert matters.input_qparams.scale > layer.input_qparams.scale


def test_reach_leaves_an_input_whose_scale_the_run_time_finds() -> None:
    layer = _layer("int8")
    assert layer.input_qparams is not None
    dynamic = layer.input_qparams = replace(layer.input_qparams, dynamic=True)
    reach.correct(layer)
    assert layer.input_qparams is dynamic


def test_tokens_count_by_what_they_do_to_the_outputs(demo: Model, images: ImageSet) -> None:
    """Of the last block a classifier reads the class token; its patches still count, by their relative error."""
    model, seen = copy_of(demo), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bias, "correct", lambda layer: seen.update({layer.name: layer}))
        correct(model.module, _plan(model.module), images, ["bias"])
    last = seen[f"blocks.{len(demo.module.blocks) - 1}.mlp.fc2"]
    found = last.importance.reshape(len(images), -1)
    assert float(found.mean()) == pytest.approx(1)
    patches = last.wanted.reshape(*found.shape, -1)[:, 1:].square().sum(2)
    torch.testing.assert_close(found[:, 1:] * patches, (found[0, 1] * patches[0, 0]).expand_as(patches))
    assert found[:, 0].mean() > 10 * found[:, 1:].mean()


def test_every_window_of_every_image_has_its_tokens() -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 56, "depths": (2, 1), "num_heads": (3, 6), "num_classes": 10}
    module = timm.create_model("swin_tiny_patch4_window7_224", **sizes).eval().requires_grad_(False)
    attach_sites(module)
    seen: dict[str, Layer] = {}
    pixels = np.random.default_rng(0).normal(size=(3, 3, 56, 56)).astype(np.float32)
    preprocess = Preprocess((56, 56), 1.0, "center", "bicubic", (0.0,) * 3, (1.0,) * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bias, "correct", lambda layer: seen.update({layer.name: layer}))
        correct(module, _plan(module), ImageSet.of(pixels, preprocess, source="test"), ["bias"])
    important = token_importance(module, torch.from_numpy(pixels))
    assert set(important) == set(seen) and len(seen) > 12
    for name, layer in seen.items():
        assert torch.equal(layer.importance, token_weights(important[name], layer.wanted)), name
        assert not torch.equal(layer.importance, token_weights(None, layer.wanted)), name


def _plan(module: nn.Module) -> dict[str, QParams]:
    """INT8 for every Linear of the blocks."""
    sites = {}
    for name, layer in layers_of(module).items():
        low, high = layer.weight.amin(1).numpy(), layer.weight.amax(1).numpy()
        sites[f"{name}.weight"] = QParams(*choose_qparams(low, high, CODES["int8"]), CODES["int8"], 0)
        ends = np.float32(-8), np.float32(8)
        sites[f"{name}.input"] = QParams(*choose_qparams(*map(np.asarray, ends), CODES["int8"]), CODES["int8"], None)
    return sites


def test_what_a_correction_sees_are_the_inputs_of_the_two_models(demo: Model, images: ImageSet) -> None:
    model = copy_of(demo)
    plan = {k: v for k, v in _plan(model.module).items() if k.startswith("blocks.")}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    class Spy:
        @staticmethod
        def correct(layer: Layer) -> None:
            seen[layer.name] = layer.inputs, layer.wanted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bias, "correct", Spy.correct)
        assert correct(model.module, plan, images, ["bias"]) == plan
    name = "blocks.3.mlp.fc2"
    wanted, inputs = [], []
    layer = layers_of(demo.module)[name]
    hooks = [
        layer.register_forward_hook(lambda _layer, _inputs, output: wanted.append(output.flatten(0, -2))),
        layer.input_site.register_forward_hook(lambda _site, _inputs, output: inputs.append(output.flatten(0, -2))),
    ]
    probe = torch.from_numpy(images.pixels[:])
    with torch.inference_mode():
        demo.module(probe)
        set_mode(demo.module, Mode.FAKE, qparams=plan)
        demo.module(probe)
    set_mode(demo.module, Mode.OFF)
    for hook in hooks:
        hook.remove()
    assert list(seen) == [n.removesuffix(".weight") for n in sites_of(demo.module) if n in plan and "weight" in n]
    assert torch.allclose(seen[name][1], wanted[0], atol=1e-4)
    scale = float(plan[f"{name}.input"].scale)
    same = (seen[name][0] - inputs[-1]).abs() < 1e-4
    assert same.float().mean() > 0.99 and (seen[name][0] - inputs[-1]).abs().max() <= 1.01 * scale


class _TokensFirst(nn.Module):
    """Tokens (tokens, N, C) in between, as detectors have them, and a bias from what is the same for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mixed = nn.Linear(12, 16), nn.Linear(16, 16)
        self.position, self.head = nn.Linear(2, 16), nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images.flatten(1).unflatten(1, (-1, 12)))
        places = torch.stack([torch.arange(16.0), torch.arange(16.0).flip(0)], 1)
        tokens = self.mixed(tokens.transpose(0, 1)).transpose(0, 1) + self.position(places)
        return self.head(tokens.mean(1))


def test_a_layer_that_does_not_read_image_after_image_is_left_as_it_is_and_named() -> None:
    torch.manual_seed(0)
    module = _TokensFirst().eval().requires_grad_(False)
    attach_sites(module)
    before = {name: layer.bias.clone() for name, layer in layers_of(module).items() if layer.bias is not None}
    pixels = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)
    preprocess = Preprocess((8, 8), 1.0, "center", "bicubic", (0.0,) * 3, (1.0,) * 3)
    with pytest.warns(CalibrationWarning, match=r"bias left `mixed` and 1 more layers"):
        correct(module, _plan(module), ImageSet.of(pixels, preprocess, source="test"), ["bias"])
    moved = {name for name, layer in layers_of(module).items() if not torch.equal(layer.bias, before[name])}
    assert moved == {"stem", "head"}


def test_refined_weights_and_scales_come_back_from_their_file(demo: Model, images: ImageSet, tmp_path: Path) -> None:
    model = copy_of(demo)
    plan = _plan(model.module)
    sites = correct(model.module, plan, images, ["reach", "bias"])
    save_refined(tmp_path / "refined.safetensors", demo, model, sites)
    back = load_refined(demo, tmp_path / "refined.safetensors")
    state = model.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in back.module.state_dict().items())
    assert back.fingerprint != demo.fingerprint
    again = load_scales(tmp_path / "refined.safetensors", plan)
    assert all(np.array_equal(again[site].scale, sites[site].scale) for site in plan)


def test_refined_weights_of_another_model_are_refused(demo: Model, tmp_path: Path) -> None:
    other = load_model("test_vit", random_weights=True)
    changed = copy_of(other)
    for parameter in changed.module.parameters():
        parameter += 1
    save_refined(tmp_path / "refined.safetensors", other, changed)
    with pytest.raises(BundleError, match="holds weights of another model"):
        load_refined(demo, tmp_path / "refined.safetensors")
    with pytest.raises(BundleError, match="are not here"):
        load_refined(demo, tmp_path / "gone.safetensors")


def test_a_run_with_the_default_passes_is_checked_against_float_as_it_was(demo: Model, tmp_path: Path) -> None:
    recipe = dfq.Recipe(model="demo", generator="noise", count=8)
    found = dfq.export(recipe, tmp_path / "run", limit=64)
    assert found.verdict == "pass"
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    kinds = [name.partition("-")[0] for name in manifest["model"]["refined"]]
    assert kinds == ["folded", "refined"]
    assert manifest["model"]["fingerprint"] == demo.fingerprint
    done: list[str] = []

    class Stages:
        def stage(self, name: str, already_done: bool) -> None:
            done.extend([name] if already_done else [])

        def progress(self, *_: object) -> None:
            """Not looked at."""

        def tell(self, _text: str) -> None:
            """Not looked at."""

    dfq.export(recipe, tmp_path / "run", limit=8, watch=Stages())
    assert {"folded", "ranges", "noise", "refined", "float"} <= set(done)
    (tmp_path / "run" / "work" / manifest["model"]["refined"][-1]).unlink()
    with pytest.raises(BundleError, match=r"the refined weights in .* are not here"):
        dfq.check(tmp_path / "run", limit=8)


def test_passes_leave_the_graph_as_many_operators_as_it_had(tmp_path: Path) -> None:
    kinds = []
    for refine in ("none", "smooth,reparam,reach,clip,bias,ridge,gptq"):
        recipe = dfq.Recipe(model="demo", generator="noise", count=8, refine=refine, spare="none")
        dfq.export(recipe, tmp_path / refine, limit=8)
        kinds.append(Counter(node.op_type for node in onnx.load(tmp_path / refine / "model.onnx").graph.node))
    assert kinds[0] == kinds[1]


def test_a_pass_that_does_not_exist_is_told_with_those_that_do() -> None:
    with pytest.raises(RecipeError, match="no refine named `smoth`") as caught:
        dfq.Recipe(model="demo", refine="smoth,bias")
    assert "smooth" in caught.value.why
