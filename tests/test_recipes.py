"""Each recipe that optimises images, on every kind of model; and what it says where it cannot work."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from calibrators.errors import CalibrationWarning, ImagesError, RecipeError
from calibrators.preprocess import Preprocess
from calibrators.registry import pick
from dfq_deploy import pipeline
from dfq_deploy.generation import GenerateOptions, batching
from dfq_deploy.generation.device import device_named
from dfq_deploy.generation.engine import Stage
from dfq_deploy.generation.generators import dfq, noise, psaq_v1, spdfq, zeroq
from dfq_deploy.generation.generators.dfq import Dfq
from dfq_deploy.generation.generators.spdfq import Spdfq
from dfq_deploy.generation.making import make_images, why_no_next_seed
from dfq_deploy.models import Model
from dfq_deploy.models.loading import load_model
from dfq_deploy.opening import open_images
from dfq_deploy.recipe import GenerateRecipe

GENERATORS = "dfq_deploy.generation.generators"
PLAIN = {"patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 10}
MODULES = {
    "average": lambda size: VisionTransformer(img_size=size, **PLAIN, class_token=False, global_pool="avg"),
    "average, with class token": lambda size: VisionTransformer(img_size=size, **PLAIN, global_pool="avg"),
    "distilled": lambda size: VisionTransformerDistilled(img_size=size, **PLAIN),
    "registers": lambda size: VisionTransformer(img_size=size, **PLAIN, reg_tokens=3),
    "swin": lambda size: SwinTransformer(
        img_size=size, patch_size=4, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(2, 2), num_classes=10
    ),
}
TRANSFORMERS = ["dfq", "psaq_v1", "spdfq"]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (psaq_v1, spdfq, zeroq):
        for stages in ("_FAST_STAGES", "_STAGES"):
            monkeypatch.setattr(module, stages, (Stage(2, 2),), raising=False)
    monkeypatch.setattr(dfq, "_STAGE", Stage(2, 2))


def model_of(module: nn.Module, size: tuple[int, int]) -> Model:
    preprocess = Preprocess(size, 1.0, "squash", "bicubic", (0.5,) * 3, (0.5,) * 3)
    return Model("tiny", module.eval().requires_grad_(False), preprocess, "", 10, None, ("head",))


@pytest.mark.parametrize("generator", TRANSFORMERS)
@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
@pytest.mark.parametrize("kind", MODULES)
def test_a_recipe_works_on_any_transformer(generator: str, kind: str, size: tuple[int, int]):
    torch.manual_seed(0)
    if kind == "swin" and size[0] != size[1]:
        size = (64, 128)
    model = model_of(MODULES[kind](size), size)
    images = pick(GENERATORS, generator).generate(model, GenerateOptions(3))
    assert images.pixels.shape == (3, 3, *size)
    assert np.abs(images.pixels[:]).max() <= 1  # mean and deviation are 0.5
    assert images.pixels[:].std() > 0.1


@pytest.mark.parametrize("generator", TRANSFORMERS)
def test_a_model_of_one_patch_is_refused(generator: str):
    with pytest.raises(ImagesError, match="shows no attention"):
        pick(GENERATORS, generator).generate(
            model_of(VisionTransformer(img_size=16, **PLAIN), (16, 16)), GenerateOptions(1)
        )


@pytest.mark.parametrize("generator", [*TRANSFORMERS, "zeroq"])
def test_a_model_with_neither_attention_nor_batch_norm_is_refused(generator: str):
    model = model_of(timm.create_model("convnext_atto", num_classes=10), (64, 64))
    with pytest.raises(ImagesError) as refused:
        pick(GENERATORS, generator).generate(model, GenerateOptions(1))
    assert "dead_leaves" in refused.value.fix or "noise" in refused.value.fix


# dfq and SPDFQ: what each part adds.


@pytest.mark.parametrize(
    ("part", "term"),
    [
        ("classes", "cross_entropy"),
        ("patch_similarity",) * 2,
        ("roughness", "total_variation"),
        ("leaves", None),
        ("patch_dropout", None),
        ("unmoved", None),
    ],
)
def test_parts_of_dfq_can_be_left_out(part: str, term: str | None):
    demo = load_model("demo")
    whole, less = (recipe.generate(demo, GenerateOptions(4)) for recipe in (Dfq(), Dfq(**{part: False})))
    ((terms, _last),), ((left, _last),) = whole.made_by["loss"], less.made_by["loss"]
    assert terms.keys() - left.keys() == ({term} if term else set())
    assert whole.pixels[:].tobytes() != less.pixels[:].tobytes()
    if term:
        assert {name: value for name, value in terms.items() if name != term} == left, "they begin alike"
    assert why_no_next_seed(whole, demo) is None
    assert less.made_by["settings"] == {part: False}
    assert "settings of their own" in (why_no_next_seed(less, demo) or "")


def test_the_last_quarter_of_a_batch_stays_as_it_begins():
    demo = load_model("demo")
    short, long = (Dfq(steps).generate(demo, GenerateOptions(9)) for steps in (1, 3))
    alike = (short.pixels[:] == long.pixels[:]).all((1, 2, 3))
    assert alike.tolist() == [False] * 7 + [True] * 2
    assert long.made_by["passes"]["forward"] == 3 * 7 / 9


def test_parts_of_spdfq_can_be_left_out():
    demo = load_model("demo")
    made = {}
    for alignment in (False, True):
        for reinforcement in (False, True):
            images = Spdfq(alignment=alignment, reinforcement=reinforcement).generate(demo, GenerateOptions(4))
            ((first, _last),) = images.made_by["loss"]
            assert ("attention" in first) == alignment
            made[alignment, reinforcement] = images.pixels[:].tobytes()
    assert len(set(made.values())) == 4


def test_parts_are_shown_as_large_as_images():
    images = torch.arange(2 * 8 * 8.0).reshape(2, 1, 8, 8)
    shown = spdfq._with_parts([(1, 0, 4, 4, 8)], images)
    assert shown.shape == (3, 1, 8, 8)
    torch.testing.assert_close(shown[:2], images)
    assert shown[2, 0].min() == images[1, 0, 0, 4] and shown[2, 0].max() == images[1, 0, 3, 7]


def test_a_label_names_the_parts_of_its_image():
    owners = torch.tensor([0, 0, 1])
    soft = Spdfq()._labels(owners, 2, 50, torch.Generator().manual_seed(0))
    hard = Spdfq(soft_labels=False)._labels(owners, 2, 50, torch.Generator().manual_seed(0))
    classes = hard[2:].argmax(1)  # of the parts
    assert hard.sum() == 5 and hard[0].argmax() == classes[0] and hard[1].argmax() == classes[2]
    assert soft[0].topk(2).indices.sort().values.tolist() == sorted(classes[:2].tolist())
    assert (soft[2:].argmax(1) == classes).all()


def test_spdfq_gives_the_attention_that_was_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spdfq, "_FAST_STAGES", (Stage(60, 0),))
    images = Spdfq(reinforcement=False).generate(load_model("demo"), GenerateOptions(8))
    ((first, last),) = images.made_by["loss"]
    assert last["attention"] < 0.9 * first["attention"]


# ZeroQ.


def test_zeroq_matches_what_batch_norm_remembers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zeroq, "_STAGES", (Stage(100, 0),))
    model = load_model("test_resnet", random_weights=True)
    small = replace(model, preprocess=Preprocess((32, 32), 1.0, "center", "bicubic", (0.5,) * 3, (0.5,) * 3))
    remembered = torch.from_numpy(pick(GENERATORS, "dead_leaves").generate(small, GenerateOptions(16)).pixels[:])
    for norm in [m for m in model.module.modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.momentum = None  # an average over all that it sees
        norm.reset_running_stats()
    model.module.train()(remembered)
    model.module.eval()
    ((first, last),) = zeroq.generate(small, GenerateOptions(4)).made_by["loss"]
    assert last["batch_norm"] < 0.5 * first["batch_norm"]


def test_zeroq_says_why_a_transformer_offers_nothing():
    with pytest.raises(ImagesError, match="has no BatchNorm") as refused:
        zeroq.generate(load_model("demo"), GenerateOptions(1))
    assert "LayerNorm" in refused.value.why


# Memory.


class Small(nn.Module):
    """Attention in a model for which no more than `most` images fit into memory; every step is counted."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.body, self.most, self.seen = MODULES["average"](64), most, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("made up")
        return self.body(x)


@pytest.mark.parametrize(("generator", "shown"), [("dfq", 5), ("psaq_v1", 6)])  # of 6 one stays as it begins
def test_a_batch_that_memory_does_not_hold_is_halved_once(generator: str, shown: int):
    torch.manual_seed(0)
    model = model_of(Small(3), (64, 64))
    with pytest.warns(CalibrationWarning, match="does not hold 6 images at once: they are made again, 3 at once"):
        images = pick(GENERATORS, generator).generate(model, GenerateOptions(6))
    assert len(images) == 6
    assert images.made_by["batch"] == 3
    assert model.module.seen[1:] == [shown, 3, 3, 3, 3]  # after the probe: a step of all, then two of each half


def test_a_batch_that_memory_does_not_hold_in_halves_is_refused():
    model = model_of(Small(2), (64, 64))
    with pytest.warns(CalibrationWarning), pytest.raises(ImagesError, match="does not hold 3 images at once"):
        psaq_v1.generate(model, GenerateOptions(6))


def test_a_memory_that_is_full_before_the_first_step_is_told():
    model = model_of(Small(0), (64, 64))
    with pytest.raises(ImagesError, match="does not hold the model and what psaq_v1 needs") as refused:
        make_images(["psaq_v1"], model, GenerateOptions(6))
    assert refused.value.why == "made up"


# Going on after a kill.


@pytest.mark.parametrize("generator", TRANSFORMERS)
def test_a_run_that_was_killed_goes_on_with_the_batches_that_are_missing(
    generator: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(batching, "BATCH", 2)
    torch.manual_seed(0)
    model = model_of(Small(64), (64, 64))
    generate = pick(GENERATORS, generator).generate
    whole = generate(model, GenerateOptions(5, 3))
    steps, seen = len(model.module.seen), sum(model.module.seen)

    def killed(step: int, *_: object) -> None:
        if step > 4:  # of 6: in the last of three batches
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, GenerateOptions(5, 3, keep_in=tmp_path), progress=killed)
    assert len(list(tmp_path.iterdir())) == 2
    model.module.seen.clear()
    told: list[float] = []
    resumed = generate(
        model, GenerateOptions(5, 3, keep_in=tmp_path), progress=lambda step, steps, _: told.append(step / steps)
    )
    assert len(model.module.seen) == steps - 4
    np.testing.assert_array_equal(resumed.pixels[:], whole.pixels)
    assert resumed.made_by == whole.made_by
    probes = 2 * (2 if generator == "spdfq" else 1)  # images that show the shapes
    assert resumed.made_by["passes"]["forward"] == (seen - probes) / 5
    assert told == [pytest.approx(share) for share in (1 / 3, 2 / 3, 1)]
    other = generate(model, GenerateOptions(5, 4, keep_in=tmp_path))
    assert other.fingerprint != whole.fingerprint


def test_batches_are_not_kept_once_the_set_is_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(batching, "BATCH", 2)
    pipeline.generate(GenerateRecipe(model="demo", generator="dfq", count=3), tmp_path / "images.safetensors")
    pictures = ["images.attention.png", "images.patch_similarity.png", "images.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [*pictures, "images.safetensors"]


# The device.


def test_a_generator_finds_the_model_on_the_device_that_was_asked_for(monkeypatch: pytest.MonkeyPatch):
    moves: list[object] = []
    demo = load_model("demo")
    monkeypatch.setattr(demo.module, "to", moves.append)
    images = make_images(["noise"], demo, GenerateOptions(2, device="cuda"))
    assert moves == ["cuda", torch.device("cpu")]
    assert images.made_by["device"] == "cuda"


def test_the_device_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    for found, wanted in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        assert device_named("auto") == wanted
        assert device_named("cpu") == "cpu"
    with pytest.raises(RecipeError, match="no GPU"):
        device_named("cuda")


# Sets that are of no use.


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda pixels: np.full_like(pixels, 0.3), "image 0 is of one colour"),
        (lambda pixels: np.where(np.arange(4)[:, None, None, None] == 2, 0, pixels), "image 2 is of one colour"),
        (lambda pixels: pixels[[0, 0, 0, 0]], "all 4 images show the same"),
    ],
)
def test_a_degenerate_set_is_refused(monkeypatch: pytest.MonkeyPatch, fault, said: str):
    demo = load_model("demo")
    sound = noise.generate(demo, GenerateOptions(4))
    make_images(["noise"], demo, GenerateOptions(4))
    broken = replace(sound, pixels=fault(sound.pixels[:]).astype(np.float32))
    monkeypatch.setattr(noise, "generate", lambda *_, **__: broken)
    with pytest.raises(ImagesError, match=said):
        make_images(["noise"], demo, GenerateOptions(4))


def test_one_image_is_a_set():
    assert len(make_images(["noise"], load_model("demo"), GenerateOptions(1))) == 1


def test_parts_that_were_made_apart_are_the_whole(demo: Model, tmp_path: Path) -> None:
    for name, first, count in (("whole", 0, 40), ("begin", 0, 32), ("rest", 32, 8)):
        recipe = GenerateRecipe(model="demo", generator="noise", count=count, first=first)
        pipeline.generate(recipe, tmp_path / name)
    parts = open_images(f"{tmp_path / 'begin'},{tmp_path / 'rest'}", demo.preprocess)
    assert parts.fingerprint == open_images(str(tmp_path / "whole"), demo.preprocess).fingerprint
