"""PSAQ-ViT V2: images and student compete, and the student goes the whole way, into engine, reference and report."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import dfq_deploy as dfq
from calibrators.errors import CalibrationWarning, ImagesError
from calibrators.images import ImageSet
from calibrators.plan import QuantPlan
from calibrators.preprocess import Preprocess
from calibrators.sites import attach_sites
from dfq_deploy.cli import run
from dfq_deploy.formats import FormatsOf
from dfq_deploy.generation import GenerateOptions, batching, checkpoint, engine, quiet
from dfq_deploy.generation.engine import Batch, Schedule, Stage, Term, View, optimise
from dfq_deploy.generation.generators import psaq_v2
from dfq_deploy.generation.making import make_images
from dfq_deploy.models import Model
from dfq_deploy.models.families import swin
from dfq_deploy.models.loading import load_model
from dfq_deploy.recipe import CalibrateRecipe, GenerateRecipe
from dfq_deploy.refined import load_refined
from exporters.bundle import open_bundle

_DEMO = dfq.Recipe(model="demo", generator="psaq_v2", count=4)


@pytest.fixture(scope="module", autouse=True)
def few_steps() -> Iterator[None]:
    """Three steps for the images alone, and four against the student."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psaq_v2, "_FAST_STAGES", (Stage(3, 2), Stage(4, 2)))
        yield


@pytest.fixture(scope="module")
def made(demo: Model) -> ImageSet:
    """Four images and a student for W4A4."""
    return psaq_v2.generate(demo, _options(4, "w4a4"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checked demo engine with a student's weights; copy it before changing it."""
    folder = tmp_path_factory.mktemp("v2") / "bundle"
    assert dfq.export(_DEMO, folder).verdict == "pass"
    return folder


def _options(count: int, scheme: str, seed: int = 0) -> GenerateOptions:
    formats = FormatsOf(CalibrateRecipe(model="demo", scheme=scheme))
    return GenerateOptions(count, seed, formats=formats)


def _kept(folder: Path, stage: str) -> Path:
    (file,) = (folder / "work").glob(f"{stage}-*.safetensors")
    return file


# The competition.


def test_the_students_passes_count_too(demo: Model, made: ImageSet) -> None:
    alone, against, learning = 3 + 4, 4, 4
    each = {"forward": alone + against + learning, "backward": alone + against + learning}
    assert made.made_by["passes"] == each
    assert psaq_v2.generate(demo, _options(9, "w8a8")).made_by["passes"] == each, (
        "its parts of 8 are counted as one pass"
    )


def test_passes_are_those_of_each_batch(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "BATCH", 2)
    assert psaq_v2.generate(demo, _options(3, "w4a4")).made_by["passes"] == {"forward": 15, "backward": 15}


def _learner(model: Model, scheme: str) -> psaq_v2._Learner:
    """A learner that joins at once."""
    learner = psaq_v2._Learner(model, _options(1, scheme).formats, exact=True, learning_rate=1e-4)
    learner._joins, learner._steps = 0, 10**6
    return learner


def _view(model: Model, step: int = 0) -> View:
    pixels = torch.randn(16, *model.preprocess.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return View(step, pixels, model.module(pixels), {})


def test_learning_steps_lower_the_discrepancy(demo: Model) -> None:
    learner, view = _learner(demo, "w4a4"), _view(demo)
    learner.against(view)
    for _ in range(10):
        learner.learn(view)
    learner.against(replace(view, step=1))
    first, last = learner.losses
    assert first > 0.05, "it is rounded to 4 bits"
    assert last < 0.8 * first


def test_a_student_that_is_near_its_teacher_moves_little(demo: Model) -> None:
    far = []
    for scheme in ("w4a4", "w8a8"):
        learner, view = _learner(demo, scheme), _view(demo)
        learner.against(view)
        learner.learn(view)
        before, student = demo.module.state_dict()["head.weight"], learner.student()
        assert student is not None
        far.append(np.abs(student.weights["head.weight"] - before.numpy()).max() / float(learner.losses[0]))
    assert far[1] == pytest.approx(far[0], rel=0.1), "one share of the discrepancy"


def test_generation_steps_raise_the_discrepancy(demo: Model) -> None:
    learner = _learner(demo, "w4a4")
    made = optimise(
        demo,
        _view(demo).pixels[:4],
        Batch(2, torch.Generator().manual_seed(0), quiet),
        layers={},
        terms=[Term("discrepancy", -1.0, learner.against)],
        schedule=Schedule((Stage(30, 0),), 0.2, 0.2, None),
        dtype=None,
    )
    assert made.last["discrepancy"] > 1.3 * made.first["discrepancy"]
    assert learner.student() is None, "it was only looked at"


def test_the_teacher_stays_as_it_is(demo: Model) -> None:
    before = {name: value.clone() for name, value in demo.module.state_dict().items()}
    images = psaq_v2.generate(demo, _options(2, "w4a4"))
    assert images.student is not None and images.student.weights
    assert all(torch.equal(value, before[name]) for name, value in demo.module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in demo.module.parameters())


def test_the_student_is_the_model_moved_a_little_and_says_what_for(demo: Model, made: ImageSet) -> None:
    assert made.student is not None
    assert (made.student.model, made.student.scheme) == (demo.fingerprint, "w4a4")
    before = demo.module.state_dict()
    for name, value in made.student.weights.items():
        assert 0 < np.abs(value - before[name].numpy()).max() < 0.01, name
    first, last = made.made_by["student"]["discrepancy"]
    assert first > 0 and last > 0
    json.dumps(made.made_by)


def test_there_is_no_student_without_formats_or_where_nothing_is_rounded(demo: Model) -> None:
    assert psaq_v2.generate(demo, GenerateOptions(2)).student is None
    images = psaq_v2.generate(demo, _options(2, "float"))
    assert images.student is None
    assert images.made_by["loss"][0][1]["discrepancy"] == 0


def test_one_seed_gives_the_same_student(demo: Model, made: ImageSet) -> None:
    again, other, elsewhere = (
        psaq_v2.generate(demo, _options(4, scheme, seed)) for scheme, seed in (("w4a4", 0), ("w4a4", 1), ("w8a8", 0))
    )
    assert made.fingerprint == again.fingerprint
    students = [images.student for images in (made, other, elsewhere)]
    assert len({student.fingerprint for student in students if student}) == 3


def test_the_student_goes_on_from_batch_to_batch(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "BATCH", 2)
    two, four = (psaq_v2.generate(demo, _options(count, "w4a4")) for count in (2, 4))
    np.testing.assert_array_equal(two.pixels, four.pixels[:2])
    assert two.student and four.student
    far = [
        sum(np.abs(value - demo.module.state_dict()[name].numpy()).sum() for name, value in student.weights.items())
        for student in (two.student, four.student)
    ]
    assert far[1] > 1.2 * far[0]


@pytest.mark.parametrize("killed_in", [1, 5, 9 + 1, 9 + 8])
def test_images_and_student_that_were_cut_off_go_on_where_they_were(
    demo: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: int
) -> None:
    """Whether in the first batch or in the second, before the student joins or after."""
    monkeypatch.setattr(batching, "BATCH", 2)
    monkeypatch.setattr(checkpoint, "_SECONDS", 0.0)
    monkeypatch.setattr(engine, "LOOK_EVERY", 3)
    monkeypatch.setattr(psaq_v2, "_ROUND", 3)
    monkeypatch.setattr(psaq_v2, "_FAST_STAGES", (Stage(3, 2), Stage(6, 2)))
    options, steps = _options(3, "w4a4"), [0]
    whole = psaq_v2.generate(demo, options)
    learn = psaq_v2._Learner.learn

    def counted(self: psaq_v2._Learner, view: View) -> None:
        learn(self, view)
        steps[0] += 1
        if steps[0] == killed_in:
            raise KeyboardInterrupt

    monkeypatch.setattr(psaq_v2._Learner, "learn", counted)
    kept = replace(options, keep_in=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        psaq_v2.generate(demo, kept)
    for still_to_do in (18 - killed_in // 3 * 3, 0):
        steps[0] = 100
        resumed = psaq_v2.generate(demo, kept)
        assert steps[0] == 100 + still_to_do
        np.testing.assert_array_equal(resumed.pixels, whole.pixels)
        assert resumed.student and whole.student
        assert resumed.student.fingerprint == whole.student.fingerprint
        assert resumed.made_by == whole.made_by


def test_what_another_order_left_makes_no_other_student(
    demo: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "BATCH", 2)
    first = _options(5, "w4a4")
    for other in (first, replace(first, count=3), replace(first, seed=1), _options(5, "w8a8"), first):
        again = psaq_v2.generate(demo, replace(other, keep_in=tmp_path))
        alone = psaq_v2.generate(demo, other)
        np.testing.assert_array_equal(again.pixels, alone.pixels)
        assert again.student and alone.student
        assert again.student.fingerprint == alone.student.fingerprint
    for file in sorted(tmp_path.glob("*.learned"))[::2]:
        file.unlink()
    again = psaq_v2.generate(demo, replace(first, keep_in=tmp_path))
    assert again.student and again.student.fingerprint == alone.student.fingerprint


def test_where_memory_ends_the_student_begins_again_with_the_images(
    demo: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn, left = psaq_v2._Learner.learn, [6]

    def short_of_memory(self: psaq_v2._Learner, view: View) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError
        learn(self, view)

    with monkeypatch.context() as patch, pytest.warns(CalibrationWarning, match="2 at once"):
        patch.setattr(psaq_v2._Learner, "learn", short_of_memory)
        halved = psaq_v2.generate(demo, _options(4, "w4a4"))
    monkeypatch.setattr(batching, "BATCH", 2)
    assert psaq_v2.generate(demo, _options(4, "w4a4")).fingerprint == halved.fingerprint


def test_a_student_that_breaks_down_is_named(demo: Model) -> None:
    with pytest.raises(ImagesError, match=r"step 5: the term `discrepancy` is nan"):
        psaq_v2.PsaqV2(learning_rate=float("inf")).generate(demo, _options(2, "w4a4"))


def _small(name: str, size: int, **options: Any) -> Model:
    torch.manual_seed(0)
    module: nn.Module = timm.create_model(name, img_size=size, num_classes=10, **options).eval().requires_grad_(False)
    attach_sites(module)
    preprocess = Preprocess((size, size), 0.9, "center", "bicubic", (0.5,) * 3, (0.5,) * 3)
    return Model(name, module, preprocess, "f" * 64, 10, None, ("head",))


_MODELS = {
    "deit": lambda: _small("deit_tiny_patch16_224", 48, depth=2),
    "distilled": lambda: _small("deit_tiny_distilled_patch16_224", 48, depth=2),
    "average": lambda: _small("vit_tiny_patch16_224", 64, depth=2, global_pool="avg", class_token=False, fc_norm=False),
    "swin": lambda: _small("swin_tiny_patch4_window7_224", 56, depths=(2, 1), num_heads=(3, 6)),
    "real": lambda: load_model("test_vit2", random_weights=True),
}


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", _MODELS)
def test_every_kind_of_transformer_has_a_student(name: str, scheme: str) -> None:
    model = _MODELS[name]()
    if name == "swin":
        swin.attach_attention(model.module)
    images = psaq_v2.generate(model, _options(2, scheme))
    assert images.pixels.shape == (2, *model.preprocess.shape)
    assert images.student is not None
    assert any(name.endswith("mlp.fc2.weight") for name in images.student.weights)
    low, high = model.preprocess.bounds
    assert ((images.pixels >= low) & (images.pixels <= high)).all()


@pytest.mark.parametrize("scheme", ["w8a8_asym", "w8a8_dynamic", "w8a8_fp8", "w4a16", "w6a6"])
def test_a_student_learns_for_every_scheme(demo: Model, scheme: str) -> None:
    images = psaq_v2.generate(demo, _options(2, scheme))
    assert images.student is not None and images.student.scheme == scheme
    assert 0 < images.made_by["student"]["discrepancy"][0] < 1


# The file.


def test_images_and_student_are_one_file(made: ImageSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made.save(tmp_path / "images.safetensors")
    found = ImageSet.load(tmp_path / "images.safetensors")
    assert found.student is not None and made.student is not None
    assert found.fingerprint == made.fingerprint
    assert (found.student.model, found.student.scheme) == (made.student.model, made.student.scheme)
    assert found.student.weights.keys() == made.student.weights.keys()
    for name, value in made.student.weights.items():
        np.testing.assert_array_equal(found.student.weights[name], value)
    assert found.spread(2).student == found.student
    assert run(["show", str(tmp_path / "images.safetensors")]) == 0
    assert f"student: {len(made.student.weights)} tensors, learned for w4a4" in capsys.readouterr().out


def test_a_students_altered_weight_is_noticed(made: ImageSet, tmp_path: Path) -> None:
    made.save(tmp_path / "images.safetensors")
    with (tmp_path / "images.safetensors").open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))["__metadata__"]
    tensors = load_file(tmp_path / "images.safetensors")
    name = next(name for name in tensors if name.startswith("student."))
    tensors[name].reshape(-1)[0] += 1
    save_file(tensors, tmp_path / "altered.safetensors", header)
    with pytest.raises(ImagesError, match="holds other images than its header says"):
        ImageSet.load(tmp_path / "altered.safetensors")


def test_images_with_and_without_a_student_differ(made: ImageSet) -> None:
    plain = ImageSet.of(made.pixels, made.preprocess, source=made.source)
    assert plain.fingerprint != made.fingerprint
    assert plain.fingerprint == replace(made, student=None).of(made.pixels, made.preprocess, source="x").fingerprint


def test_one_of_several_generators_brings_the_student(demo: Model) -> None:
    images = make_images(["dead_leaves", "psaq_v2"], demo, _options(4, "w8a8"))
    assert images.student is not None
    assert images.made_by["psaq_v2"]["count"] == 2


# The way into the engine.


def test_engine_and_reference_have_the_students_weights_and_float_has_not(
    bundle: Path, demo: Model, demo_bundle: Path
) -> None:
    manifest, report = open_bundle(bundle), json.loads((bundle / "report.json").read_text())
    plain = json.loads((demo_bundle / "report.json").read_text())
    images, plan = ImageSet.load(_kept(bundle, "images")), QuantPlan.load(bundle / "plan.safetensors")
    assert (manifest.model.student, report["student"]) == (True, True)
    assert (open_bundle(demo_bundle).model.student, plain["student"]) == (False, False)
    assert manifest.model.refined == (_kept(bundle, "student").name,), "it is not refined unless that is asked for"
    assert manifest.model.fingerprint == demo.fingerprint
    student = load_refined(demo, _kept(bundle, "student"))
    assert images.student is not None and images.student.scheme == "w8a8"
    for name, value in images.student.weights.items():
        np.testing.assert_array_equal(student.module.state_dict()[name], value)
    assert plan.model == student.fingerprint != demo.fingerprint
    assert report["top1"]["float"] == plain["top1"]["float"]
    assert report["top1"]["engine"] > 90


def test_a_student_is_refined_when_asked_for(bundle: Path, demo: Model, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(bundle, folder)
    assert dfq.export(replace(_DEMO, refine="smooth,bias"), folder, limit=16).verdict == "pass"
    manifest, plan = open_bundle(folder), QuantPlan.load(folder / "plan.safetensors")
    stages = ("student", "folded", "refined")
    assert manifest.model.refined == tuple(_kept(folder, stage).name for stage in stages)
    models = [load_refined(demo, _kept(folder, stage)) for stage in stages]
    assert len({model.fingerprint for model in models}) == 3
    assert plan.model == models[-1].fingerprint
    pixels = torch.from_numpy(ImageSet.load(_kept(folder, "images")).pixels[:])
    torch.testing.assert_close(models[0].module(pixels), models[1].module(pixels), rtol=1e-3, atol=1e-3)
    found = dfq.sensitivity(folder, limit=2)
    assert all(layer.alone for layer in found.spared if ".attn." not in layer.name), "its ranges were found"


def test_what_is_shown_of_a_student_is_said(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["show", str(bundle)], ["check", str(bundle), "--limit", "16"]):
        run(command)
        assert "the weights are those of a student" in capsys.readouterr().out


def test_sensitivity_of_a_student_is_measured_against_float(bundle: Path, demo: Model) -> None:
    found = dfq.sensitivity(bundle, limit=4)
    costs = [layer.alone for layer in found.spared if ".attn." not in layer.name]
    assert costs and all(costs), "the ranges of the student were found"
    manifest = open_bundle(bundle)
    wanted = demo.module(torch.from_numpy(ImageSet.load(_kept(bundle, "images")).pixels[:]))
    moved = load_refined(demo, bundle / "work" / manifest.model.refined[0])
    own = (moved.module(torch.from_numpy(ImageSet.load(_kept(bundle, "images")).pixels[:])) - wanted).square().sum()
    assert min(layer.alone.noise for layer in found.layers) > 0.1 * float(own), "as far from float as it is itself"


def test_a_file_brings_the_student_along(bundle: Path, tmp_path: Path) -> None:
    dfq.generate(GenerateRecipe(model="demo", generator="psaq_v2", count=4), tmp_path / "images.safetensors")
    recipe = dfq.Recipe(model="demo", calib=str(tmp_path / "images.safetensors"))
    assert dfq.export(recipe, tmp_path / "run", limit=16).student
    plans = [QuantPlan.load(folder / "plan.safetensors").fingerprint for folder in (bundle, tmp_path / "run")]
    assert plans[0] == plans[1]


def test_the_images_alone_are_had_by_converting(made: ImageSet, tmp_path: Path) -> None:
    made.save(tmp_path / "images.safetensors")
    with pytest.warns(CalibrationWarning, match="the student stays in"):
        dfq.convert(tmp_path / "images.safetensors", tmp_path / "images", to="folder")
    recipe = CalibrateRecipe(model="demo", calib=f"folder:{tmp_path / 'images'}", scheme="w4a4", refine="none")
    assert not dfq.simulate(recipe, tmp_path / "run", limit=8).student


def test_a_student_is_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "demo", "--generator", "psaq_v2", "--count", "4", "--scheme", "w4a4", "--limit", "16"]
    assert run(["simulate", *flags, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["student"] is True
    assert "the weights are those of a student" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "scheme", "named"),
    [("demo", "w8a8", "learned for w4a4"), ("other", "w4a4", "learned for another model")],
)
def test_a_student_for_something_else_is_refused(
    made: ImageSet, tmp_path: Path, model: str, scheme: str, named: str
) -> None:
    made.save(tmp_path / "images.safetensors")
    recipe = CalibrateRecipe(
        model="demo", random_weights=model == "other", calib=str(tmp_path / "images.safetensors"), scheme=scheme
    )
    with pytest.raises(ImagesError, match=named) as refused:
        dfq.simulate(recipe, tmp_path / "run", limit=8)
    assert "dfq-deploy convert" in refused.value.fix
    assert not list((tmp_path / "run" / "work").glob("student-*"))


# Runs that go on.


class _Log:
    """A watch that remembers which stages were done already, and may stop at one."""

    def __init__(self, stop_at: str = "", after: int = 0) -> None:
        self.done: dict[str, bool] = {}
        self._stop_at, self._after = stop_at, after

    def stage(self, name: str, already_done: bool) -> None:
        self.done[name] = already_done

    def progress(self, done: int, _total: int, _terms: object) -> None:
        if list(self.done)[-1] == self._stop_at and done >= self._after:
            raise KeyboardInterrupt

    def tell(self, text: str) -> None:
        raise NotImplementedError


def test_a_finished_run_repeats_nothing(bundle: Path, tmp_path: Path) -> None:
    log, folder = _Log(), tmp_path / "run"
    shutil.copytree(bundle, folder)
    dfq.export(_DEMO, folder, limit=4, watch=log)
    assert [stage for stage, done in log.done.items() if not done] == ["model", "check"]
    assert log.done["student"]


def test_another_student_takes_no_stage_of_the_one_before(bundle: Path, tmp_path: Path) -> None:
    log, folder = _Log(), tmp_path / "run"
    shutil.copytree(bundle, folder)
    dfq.export(replace(_DEMO, seed=1), folder, limit=4, watch=log)
    assert [stage for stage, done in log.done.items() if done] == []
    assert _kept(folder, "student").name != _kept(bundle, "student").name
    plans = [QuantPlan.load(place / "plan.safetensors") for place in (bundle, folder)]
    assert plans[0].model != plans[1].model


def test_other_formats_make_another_student_and_other_passes_do_not(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(bundle, folder)
    for recipe, again in ((replace(_DEMO, refine="none"), True), (replace(_DEMO, scheme="w8a8_asym"), False)):
        log = _Log()
        dfq.export(recipe, folder, limit=4, watch=log)
        assert (log.done["images"], log.done["student"]) == (again, again)


@pytest.mark.parametrize(("stage", "after"), [("images", 4), ("ranges", 0), ("noise", 0)])
def test_a_run_that_was_cut_off_gives_the_same(bundle: Path, tmp_path: Path, stage: str, after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        dfq.export(_DEMO, tmp_path / "run", watch=_Log(stage, after))
    dfq.export(_DEMO, tmp_path / "run", limit=4)
    for name in ("plan.safetensors", "model.onnx"):
        assert (tmp_path / "run" / name).read_bytes() == (bundle / name).read_bytes()
    assert _kept(tmp_path / "run", "student").read_bytes() == _kept(bundle, "student").read_bytes()
