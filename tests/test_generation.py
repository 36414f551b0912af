import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from wrapped import EXAMPLE, Small

from calibrators.errors import ImagesError
from calibrators.images import ImageSet
from calibrators.preprocess import Preprocess
from calibrators.registry import names, pick
from dfq_deploy.generation import GenerateOptions, batching, checkpoint, quiet, similarity
from dfq_deploy.generation.engine import Batch, Optimised, Schedule, Stage, Term, View, optimise
from dfq_deploy.generation.generators import dfq, psaq_v1, psaq_v2, spdfq, zeroq
from dfq_deploy.generation.making import make_images
from dfq_deploy.generation.moves import Moves
from dfq_deploy.generation.patch_dropout import PatchDropout
from dfq_deploy.generation.priors import rectangles
from dfq_deploy.generation.taps import attention_taps, captured
from dfq_deploy.models import Model
from dfq_deploy.models.loading import load_model
from dfq_deploy.models.wrapping import wrap

GENERATORS = "dfq_deploy.generation.generators"
FEW = (Stage(3, 2),)


@pytest.fixture(scope="module")
def convolutional() -> Model:
    model = load_model("test_resnet", random_weights=True)
    return replace(model, preprocess=Preprocess((32, 32), 1.0, "center", "bicubic", (0.5,) * 3, (0.5,) * 3))


@pytest.fixture
def suited(demo: Model, convolutional: Model, name: str) -> Model:
    """A small model that the generator `name` works on."""
    return convolutional if name == "zeroq" else demo


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (psaq_v1, spdfq, zeroq):
        for stages in ("_FAST_STAGES", "V1_STAGES", "_STAGES"):
            monkeypatch.setattr(module, stages, FEW, raising=False)
    for stages in ("_FAST_STAGES", "_EXACT_STAGES"):
        monkeypatch.setattr(psaq_v2, stages, FEW * 2)
    monkeypatch.setattr(dfq, "_STAGE", FEW[0])


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Taps.


def test_contexts_are_softmax_times_v(demo: Model):
    attention = demo.module.blocks[1].attn
    tap = attention_taps(demo)[1]
    images = draws(2, 3, 32, 32).float()
    with torch.no_grad(), captured({"x": attention, tap.name: tap.layer}) as inputs:
        demo.module(images)
    q, k, v = attention.qkv(inputs["x"]).reshape(2, 65, 3, 4, 16).permute(2, 0, 3, 1, 4)
    wanted = (q @ k.transpose(-2, -1) * 16**-0.5).softmax(-1) @ v  # (B, heads, N, head_dim)
    got = tap.contexts(inputs)
    assert got.shape == (2, 1, 64, 4, 16)
    torch.testing.assert_close(got[:, 0], wanted.transpose(1, 2)[:, 1:], atol=1e-5, rtol=1e-4)


def test_hooks_are_gone_after_the_block(demo: Model):
    attention_taps(demo)
    assert not any(module._forward_pre_hooks for module in demo.module.modules())


def test_a_layer_that_is_called_by_keyword_has_no_entry():
    layer = torch.nn.Linear(2, 2)
    with captured({"layer": layer}) as inputs:
        layer(input=torch.ones(1, 2))
    assert inputs == {}


class ByKeyword(torch.nn.Module):
    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(input=x)


def test_a_projection_that_is_called_by_keyword_is_no_tap_and_nor_is_the_next_layer():
    module = Small("features")
    module.merge = ByKeyword(module.merge)
    with pytest.raises(ImagesError, match="shows no attention"):
        attention_taps(wrap(module, EXAMPLE, task="features"))


def test_distilled_deit_drops_both_prefix_tokens():
    taps = attention_taps(load_model("deit_tiny_distilled_patch16_224", random_weights=True))
    assert {(tap.prefix, tap.tokens, tap.windows) for tap in taps} == {(2, 196, 1)}
    assert len(taps) == 12


def test_windows_of_one_image_stay_together():
    model = load_model("swin_t", random_weights=True)
    taps = attention_taps(model)
    assert [(tap.windows, tap.prefix, tap.tokens) for tap in taps[::3]] == [
        (64, 0, 49),
        (16, 0, 49),
        (4, 0, 49),
        (4, 0, 49),
    ]
    images = draws(2, 3, 224, 224).float()
    contexts = []
    for shown in (images, images[1:]):
        with torch.no_grad(), captured({taps[0].name: taps[0].layer}) as inputs:
            model.module(shown)
        contexts.append(taps[0].contexts(inputs))
    torch.testing.assert_close(contexts[0][1], contexts[1][0])


@pytest.mark.parametrize("exact", [False, True])
def test_model_without_attention_is_refused(exact: bool):
    model = load_model("test_resnet", random_weights=True)
    with pytest.raises(ImagesError, match="shows no attention") as refused:
        psaq_v1.generate(model, GenerateOptions(1, 0, exact))
    assert "zeroq" in refused.value.fix


# The loop.


def run_loop(model: Model, term: Term, *, steps: int, plateau: float | None = None, progress=quiet):
    return optimise(
        model,
        torch.zeros(2, *model.preprocess.shape),
        Batch(2, torch.Generator().manual_seed(0), progress),
        layers={},
        terms=[term],
        schedule=Schedule((Stage(steps, 3),), 0.1, 0.2, plateau),
        dtype=None,
    )


def test_patch_dropout_shows_the_blocks_another_half_of_the_patches_in_each_step(demo: Model):
    taps = attention_taps(demo)
    prefix, patches = taps[0].prefix, taps[0].tokens
    dropout = PatchDropout.drawn(demo.module, taps, 3, torch.Generator().manual_seed(0))
    assert dropout is not None and dropout.patches == patches // 2
    shown = draws(2, *demo.preprocess.shape).float()
    tokens = {}
    with torch.no_grad(), captured({"first": demo.module.blocks[0], "norm": demo.module.norm}) as inputs:
        demo.module(shown)
        whole = inputs["first"]
        for step in range(3):
            with dropout.during(step):
                demo.module(shown)
            tokens[step] = dropout.tokens[step].tolist()
            assert tokens[step][:prefix] == list(range(prefix))
            assert len(set(tokens[step])) == prefix + patches // 2
            assert torch.equal(inputs["first"], whole[:, tokens[step]])
            assert inputs["norm"].shape[1] == prefix + patches // 2
        assert len({tuple(kept) for kept in tokens.values()}) == 3
        demo.module(shown)
        assert torch.equal(inputs["first"], whole), "outside the block it sees all of them"


class Masked(VisionTransformer):
    """Attention with a mask of one size."""

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        tokens = self.patch_embed.num_patches + self.num_prefix_tokens
        return super().forward(x, torch.ones(tokens, tokens, dtype=torch.bool).tril())


def test_a_model_that_counts_on_all_patches_sees_them():
    module = Masked(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=10).eval()
    masked = wrap(module, torch.zeros(1, 3, 32, 32), task="classification")
    for model in (load_model("test_vit_relpos", random_weights=True), masked):
        assert PatchDropout.drawn(model.module, attention_taps(model), 1, torch.Generator()) is None
    assert len(dfq.Dfq(steps=2).generate(masked, GenerateOptions(4))) == 4


def test_rate_warms_up_and_cools_down_as_v1s():
    stage = Stage(500, 15)
    schedule = Schedule((stage, stage), 0.2, 0.2, None)
    assert schedule.rate(stage, 0) == pytest.approx(0.2 / 100)
    assert schedule.rate(stage, 99) == schedule.rate(stage, 100) == pytest.approx(0.2)
    assert schedule.rate(stage, 300) == pytest.approx(0.1)
    assert 0 < schedule.rate(stage, 499) < 1e-5


def test_moves_are_rolls_and_flips_and_come_back():
    moves = Moves.drawn([(20, 0), (20, 3)], (6, 8), torch.Generator().manual_seed(1), torch.device("cpu"))
    image = draws(1, 2, 6, 8)
    rolls = {
        (offset, flip): image.roll((offset, offset), (2, 3)).flip(3) if flip else image.roll((offset, offset), (2, 3))
        for offset in range(-3, 4)
        for flip in (False, True)
    }
    seen = []
    for step in range(40):
        moved = moves.moved(image, step)
        seen.append(next(key for key, rolled in rolls.items() if torch.equal(rolled, moved)))
        assert torch.equal(moves.moved_back(moved, step), image)
    assert {offset for offset, _ in seen[:20]} == {0}
    assert len({offset for offset, _ in seen[20:]}) > 4
    assert len({flip for _, flip in seen}) == 2


def test_gradient_goes_back_to_the_pixel_that_was_shown(demo: Model):
    target = draws(3, 32, 32).float().clamp(-1, 1)
    schedule = Schedule((Stage(30, 0),), 0.1, 0.2, None)
    moves = Moves.drawn([(30, 0)], (32, 32), torch.Generator().manual_seed(0), torch.device("cpu"))
    # The term un-does the move itself: only if the loop maps the gradient back do the pixels reach the target.
    term = Term("distance", 1.0, lambda view: (moves.moved_back(view.pixels, view.step) - target).square().mean())
    made = optimise(
        demo,
        torch.zeros(1, 3, 32, 32),
        Batch(2, torch.Generator().manual_seed(0), quiet),
        layers={},
        terms=[term],
        schedule=schedule,
        dtype=None,
    )
    assert made.last["distance"] < 0.01 * made.first["distance"]


def test_gradient_goes_back_through_the_augmentation(demo: Model):
    target = draws(3, 16, 16).float().clamp(-1, 1)
    schedule = Schedule((Stage(40, 0),), 0.1, 0.2, None)
    moves = Moves.drawn([(40, 0)], (32, 32), torch.Generator().manual_seed(0), torch.device("cpu"))

    def with_corner(images: torch.Tensor) -> torch.Tensor:
        corner = images[:, :, :16, :16].flip(2)
        return torch.cat([images, corner.repeat_interleave(2, 2).repeat_interleave(2, 3)])

    def distance(view: View) -> torch.Tensor:
        corner = moves.moved_back(view.pixels, view.step)[1:, :, ::2, ::2].flip(2)
        return (corner - target).square().mean() + (len(view.outputs) - 2)  # the model was shown both

    made = optimise(
        demo,
        torch.zeros(1, 3, 32, 32),
        Batch(2, torch.Generator().manual_seed(0), quiet),
        layers={},
        terms=[Term("corner", 1.0, distance)],
        schedule=schedule,
        dtype=None,
        augment=with_corner,
    )
    assert made.last["corner"] < 0.01 * made.first["corner"]
    np.testing.assert_allclose(made.pixels[0, :, :16, :16], target, atol=0.2)
    assert not made.pixels[:, :, 16:].any() and not made.pixels[:, :, :, 16:].any()


@pytest.mark.parametrize("plateau", [None, 0.5])
@pytest.mark.parametrize("killed_in", [3, 25, 75])
def test_a_loop_that_was_killed_goes_on_where_it_was(
    demo: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: int, plateau: float | None
):
    """Whether before the first file, in the first stage or in the second, and where a stage ended early."""
    monkeypatch.setattr(checkpoint, "_SECONDS", 0.0)
    ran: list[int] = []

    def run(unfinished: Path | None, killed_in: int | None = None) -> Optimised:
        def distance(view: View) -> torch.Tensor:
            if view.step == killed_in:
                raise KeyboardInterrupt
            ran.append(view.step)
            return (view.pixels - 0.5).square().mean() + view.outputs.square().mean()

        batch = Batch(2, torch.Generator().manual_seed(0), quiet, unfinished)
        schedule = Schedule((Stage(50, 3), Stage(40, 1)), 0.1, 0.2, plateau)
        start, terms = torch.zeros(2, *demo.preprocess.shape), [Term("distance", 1.0, distance)]
        return optimise(demo, start, batch, layers={}, terms=terms, schedule=schedule, dtype=None)

    whole = run(None)
    kept = tmp_path / "batch.unfinished"
    with pytest.raises(KeyboardInterrupt):
        run(kept, killed_in)
    ran.clear()
    resumed = run(kept)
    np.testing.assert_array_equal(resumed.pixels, whole.pixels)
    assert replace(resumed, pixels=whole.pixels) == whole  # terms, steps and passes as well
    assert min(ran) == killed_in // 10 * 10


def test_no_state_is_written_of_what_takes_under_a_minute(demo: Model, tmp_path: Path):
    batch = Batch(2, torch.Generator().manual_seed(0), quiet, tmp_path / "batch.unfinished")
    term, schedule = Term("logits", 1.0, lambda view: view.outputs.sum()), Schedule((Stage(20, 0),), 0.1, 0.2, None)
    optimise(demo, torch.zeros(2, 3, 32, 32), batch, layers={}, terms=[term], schedule=schedule, dtype=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_term_that_is_not_finite_names_itself_and_its_step(demo: Model, value: float):
    term = Term("entropy", 1.0, lambda view: view.pixels.sum() * (value if view.step == 3 else 0.0))
    with pytest.raises(ImagesError, match=r"step 4: the term `entropy` is"):
        run_loop(demo, term, steps=20)


def test_weights_of_the_network_get_no_gradient(demo: Model):
    run_loop(demo, Term("logits", 1.0, lambda view: view.outputs.sum()), steps=1)
    assert all(parameter.grad is None for parameter in demo.module.parameters())


def test_after_each_step_one_is_told_what_was_seen(demo: Model):
    seen: list[View] = []

    class Attentive:
        def learn(self, view: View) -> None:
            seen.append(view)

        def state(self) -> dict[str, torch.Tensor]:
            return {}

        def take_up(self, state: object) -> None:
            pass

    made = optimise(
        demo,
        torch.zeros(2, *demo.preprocess.shape),
        Batch(2, torch.Generator().manual_seed(0), quiet),
        layers={},
        terms=[Term("logits", 1.0, lambda view: view.outputs.sum())],
        schedule=Schedule((Stage(2, 0), Stage(1, 0)), 0.1, 0.2, None),
        dtype=None,
        learner=Attentive(),
    )
    assert [view.step for view in seen] == [0, 1, 2]
    assert not any(view.pixels.requires_grad or view.outputs.requires_grad for view in seen)
    assert (seen[0].pixels == 0).all() and (seen[1].pixels != 0).any()
    torch.testing.assert_close(seen[1].outputs, demo.module(seen[1].pixels))
    assert made.steps == 3


def test_a_flat_loss_ends_the_stage_early(demo: Model):
    flat = Term("flat", 1.0, lambda view: view.pixels.sum() * 0)
    told = []
    made = run_loop(demo, flat, steps=100, plateau=0.001, progress=lambda *step: told.append(step[:2]))
    assert made.steps == 60  # warm-up and two windows
    assert told[-2:] == [(60, 100), (100, 100)]
    assert run_loop(demo, flat, steps=70).steps == 70


# Generators.


@pytest.mark.parametrize("name", names(GENERATORS))
def test_a_generator_says_what_it_made(suited: Model, few_steps: None, name: str):
    told = []
    images = pick(GENERATORS, name).generate(
        suited, GenerateOptions(count=3, seed=5), progress=lambda *step: told.append(step)
    )
    assert images.pixels.shape == (3, *suited.preprocess.shape)
    assert images.pixels.dtype == np.float32
    assert images.source == f"synthetic:{name}"
    assert images.labels is None
    assert images.made_by["generator"] == name
    assert images.made_by["model_fingerprint"] == suited.fingerprint
    assert told[-1][0] == told[-1][1]
    json.dumps(images.made_by)


@pytest.mark.parametrize("name", names(GENERATORS))
@pytest.mark.parametrize("exact", [False, True])
def test_one_seed_gives_the_same_bytes(suited: Model, few_steps: None, tmp_path, name: str, exact: bool):
    generate = pick(GENERATORS, name).generate
    for file, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate(suited, GenerateOptions(3, seed, exact)).save(tmp_path / file)
    first, again, other = ((tmp_path / file).read_bytes() for file in "abc")
    assert first == again
    assert ImageSet.load(tmp_path / "a").fingerprint != ImageSet.load(tmp_path / "c").fingerprint
    assert first != other


@pytest.mark.parametrize(
    ("name", "passes"), [("psaq_v1", 3), ("dfq", 3), ("zeroq", 3), ("psaq_v2", 3), ("noise", 0), ("dead_leaves", 0)]
)
def test_the_passes_per_image_are_those_of_the_schedule(
    suited: Model, few_steps: None, monkeypatch: pytest.MonkeyPatch, name: str, passes: int
):
    monkeypatch.setattr(batching, "BATCH", 2)
    made = pick(GENERATORS, name).generate(suited, GenerateOptions(3)).made_by
    assert made["passes"] == {"forward": passes, "backward": passes}


def test_parts_of_images_are_passes_too(demo: Model, few_steps: None, monkeypatch: pytest.MonkeyPatch):
    drawn = []

    def counted(*arguments) -> torch.Tensor:
        drawn.append(rectangles(*arguments))
        return drawn[-1]

    monkeypatch.setattr(spdfq, "rectangles", counted)
    made = spdfq.generate(demo, GenerateOptions(4)).made_by
    shown = 3 * (4 + len(drawn[0])) / 4
    assert made["passes"] == {"forward": shown, "backward": shown}
    assert shown > 3


def test_a_stage_that_ends_early_takes_fewer_passes(demo: Model):
    flat = Term("flat", 1.0, lambda view: view.pixels.sum() * 0)
    made = run_loop(demo, flat, steps=100, plateau=0.001)
    assert (made.forward, made.backward) == (60 * 2, 60 * 2)


@pytest.mark.parametrize("name", names(GENERATORS))
def test_pixels_stay_within_the_models_own_bounds(suited: Model, few_steps: None, name: str):
    preprocess = Preprocess((32, 32), 1.0, "center", "bicubic", (0.5, 0.4, 0.9), (0.5, 0.9, 0.4))
    images = pick(GENERATORS, name).generate(replace(suited, preprocess=preprocess), GenerateOptions(4))
    low, high = preprocess.bounds
    lowest, highest = images.pixels.min((0, 2, 3), keepdims=True)[0], images.pixels.max((0, 2, 3), keepdims=True)[0]
    assert ((lowest >= low) & (highest <= high)).all()
    assert ((lowest < low + 0.5) & (highest > high - 0.5)).all(), "noise reached the ends, and three steps end near"


@pytest.mark.parametrize("name", names(GENERATORS))
def test_a_batch_does_not_depend_on_those_after_it(suited: Model, few_steps: None, monkeypatch, name: str):
    monkeypatch.setattr(batching, "BATCH", 2)
    generate = pick(GENERATORS, name).generate
    told = []
    five = generate(suited, GenerateOptions(5, 7), progress=lambda *step: told.append(step[:2]))
    two, four = (generate(suited, GenerateOptions(count, 7)) for count in (2, 4))
    assert len(five) == 5
    np.testing.assert_array_equal(five.pixels[:2], two.pixels)
    np.testing.assert_array_equal(five.pixels[:4], four.pixels)
    for first, rest in ((2, 3), (4, 1)):
        part = generate(suited, GenerateOptions(rest, 7, first=first))
        np.testing.assert_array_equal(five.pixels[first:], part.pixels)
    assert len(np.unique(five.pixels[:, 0, 0, :4], axis=0)) == 5  # no batch repeats another's noise
    assert told == sorted(told)


def test_a_batch_can_be_made_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batching, "BATCH", 2)
    shares = list(batching.batches(GenerateOptions(5, 7)))
    assert [size for size, _ in shares] == [2, 2, 1]
    later = list(batching.batches(GenerateOptions(4, 7)))[1][1]
    assert torch.equal(torch.rand(9, generator=shares[1][1]), torch.rand(9, generator=later))


def test_batches_of_other_stages_are_other_batches(demo: Model, few_steps: None, tmp_path: Path):
    kept = GenerateOptions(2, keep_in=tmp_path)
    recipes = [psaq_v1.PsaqV1(), *(psaq_v1.PsaqV1((Stage(steps, 2),)) for steps in (1, 2))]
    made = [recipe.generate(demo, kept).made_by for recipe in recipes]
    assert [facts["steps"] for facts in made] == [[3], [1], [2]]
    settings = [facts.get("settings") for facts in made]
    assert settings == [None, *({"stages": [{"steps": steps, "jitter": 2}]} for steps in (1, 2))]


def test_subsets_hold_different_numbers():
    subsets = similarity._subsets(5, 10, 4, torch.Generator().manual_seed(0))
    assert subsets.shape == (5, 4)
    assert all(len(set(row)) == 4 for row in subsets.tolist())
    assert similarity._subsets(2, 3, 64, torch.Generator()).shape == (2, 3)


def test_psaq_gives_images_that_the_model_takes_for_their_class(demo: Model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psaq_v1, "_FAST_STAGES", (Stage(60, 30),))
    ((first, last),) = psaq_v1.generate(demo, GenerateOptions(8)).made_by["loss"]
    assert last["cross_entropy"] < 0.3 * first["cross_entropy"]
    assert last["total_variation"] < 0.05 * first["total_variation"]


def test_several_generators_share_the_count(demo: Model, few_steps: None):
    images = make_images(["psaq_v1", "dead_leaves"], demo, GenerateOptions(5, 3))
    assert images.source == "synthetic:psaq_v1+dead_leaves"
    made = [images.made_by[name]["count"] for name in ("psaq_v1", "dead_leaves")]
    assert made == [2, 3]
    alone = pick(GENERATORS, "dead_leaves").generate(demo, GenerateOptions(3, 3))
    np.testing.assert_array_equal(images.pixels[2:], alone.pixels)


def test_dead_leaves_have_smooth_areas_and_edges(demo: Model):
    """Most neighbours are nearly alike, and some far apart; in noise they are all alike in that."""
    preprocess = Preprocess((64, 64), 1.0, "center", "bicubic", (0.5,) * 3, (0.5,) * 3)
    sized = replace(demo, preprocess=preprocess)
    peaks = []
    for name in ("dead_leaves", "noise"):
        steps = np.abs(np.diff(pick(GENERATORS, name).generate(sized, GenerateOptions(8)).pixels, axis=3))
        peaks.append(np.quantile(steps, 0.99) / np.median(steps))
    assert peaks[0] > 2 * peaks[1]


def test_generators_are_listed_without_torch():
    code = (
        "import sys; from calibrators.registry import names;"
        "print(*names('dfq_deploy.generation.generators'), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["dead_leaves", "dfq", "noise", "psaq_v1", "psaq_v2", "spdfq", "zeroq", "False"]
