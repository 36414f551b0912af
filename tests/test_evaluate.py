"""A good engine passes, each kind of bad one is caught, and the report is what it says it is."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image
from scipy import stats

import dfq_deploy as dfq
from calibrators.errors import BackendError, CalibrationWarning, ExportError, NotHereError
from calibrators.files import sha256_of
from calibrators.images import ImageSet
from calibrators.plan import QuantPlan
from dfq_deploy import evaluate
from dfq_deploy.evaluate import Check
from dfq_deploy.logits import logits_by_batch
from dfq_deploy.measures import Share
from dfq_deploy.models import Model
from dfq_deploy.opening import calibration_images, images_to_judge_by
from exporters.backends import ort
from exporters.bundle import MANIFEST, open_bundle
from exporters.census import Body
from exporters.cut import LayerCutter


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the demo bundle that may be damaged."""
    folder = tmp_path / "bundle"
    shutil.copytree(demo_bundle, folder)
    return folder


def _reseal(bundle: Path) -> None:
    """Give the manifest the hashes of the files as they are now: what is tested here is the check, not the seal."""
    facts = json.loads((bundle / MANIFEST).read_text())
    facts["files"] = {name: sha256_of(bundle / name) for name in facts["files"]}
    (bundle / MANIFEST).write_text(json.dumps(facts))


def _change(bundle: Path, names: list[str], change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrite constants of the bundle's engine."""
    model = ir.load(bundle / "model.onnx")
    for name in names:
        constant = model.graph.initializers[name]
        assert constant.const_value is not None
        values = constant.const_value.numpy()
        constant.const_value = ir.tensor(change(values).astype(values.dtype), name=name)
    ir.save(model, bundle / "model.onnx")
    _reseal(bundle)


def _report(bundle: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    report: dict[str, Any] = json.loads((bundle / "report.json").read_text(), parse_constant=refuse)
    return report


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (7, 20), (319, 360), (1299, 1300)])
def test_a_share_has_scipys_wilson_interval(hits: int, n: int) -> None:
    found = Share.of(np.arange(n) < hits)
    wanted = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert found.n == n
    assert found.percent == pytest.approx(100 * hits / n, abs=1e-3)
    assert found.low == pytest.approx(100 * wanted.low, abs=1e-3)
    assert found.high == pytest.approx(100 * wanted.high, abs=1e-3)
    assert 0 <= found.low <= found.percent <= found.high <= 100


def test_images_that_were_looked_at_several_times_count_once() -> None:
    looks = np.array([np.arange(50) < 48, np.arange(50) < 50, np.arange(50) < 49])
    found = Share.of(looks)
    assert found.percent == pytest.approx(98)
    assert dataclasses.replace(found, percent=0) == dataclasses.replace(Share.of(looks[2]), percent=0)


@pytest.mark.parametrize(("images", "moves"), [(3, 3), (499, 3), (500, 2), (999, 2), (1000, 1), (1001, 1)])
def test_the_more_images_the_fewer_moves_each_needs(images: int, moves: int) -> None:
    def rows(batch: np.ndarray, *_: object) -> np.ndarray:
        return batch.reshape(len(batch), 1)

    engine: Any = rows
    reference: Any = SimpleNamespace(model=SimpleNamespace(numbers=1), float=rows, quantized=rows, moved=rows)
    pixels = np.zeros((images, 1, 1, 1), np.float32)
    bodies: dict[Body, int] = {"fp32": moves, "fp16": 1}
    for body, wanted in bodies.items():
        seen = [batch["moved"].shape for batch in logits_by_batch(reference, engine, pixels, body)]
        assert {shape[0] for shape in seen} == {wanted}
        assert sum(shape[1] for shape in seen) == images


def test_a_good_bundle_passes(demo_run: tuple[Path, Check]) -> None:
    _, found = demo_run
    assert (found.verdict, found.ran) == ("pass", "the engine"), found.reason
    assert found.n == 360
    assert found.top1 is not None
    assert found.drop is not None
    assert found.drop[1] <= found.drop[0] <= found.drop[2]
    assert found.top1["float"].percent > 98
    assert found.agreement["engine_reference"].percent > 99
    assert max(found.layer_error.values()) < 1e-5
    assert found.layer_error.keys() == {layer for layer, kind in found.engine.precision.items() if kind == "int8"}


def test_the_drop_is_the_paired_difference_with_its_interval(demo_run: tuple[Path, Check]) -> None:
    _, found = demo_run
    assert found.top1 is not None
    assert found.drop is not None
    difference = found.top1["float"].percent - found.top1["engine"].percent
    assert found.drop[0] == pytest.approx(difference, abs=2e-3)
    assert found.drop[1] < found.drop[2]  # not even where float and engine are right on the same images


def test_images_of_another_run_do_not_pass_for_those_it_was_calibrated_on(bundle: Path, demo: Model) -> None:
    manifest = open_bundle(bundle)
    found = calibration_images(bundle, manifest, demo)
    assert found is not None
    (kept,) = (bundle / "work").glob("images-*.safetensors")
    ImageSet.of(np.flip(found.pixels[:], 0).copy(), demo.preprocess, source="another run").save(kept)
    assert calibration_images(bundle, manifest, demo) is None


def test_sub_folders_that_are_not_the_classes_give_no_labels_and_a_listing_does(demo: Model, tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / str(number)).mkdir()
        Image.new("L", (28, 28)).save(tmp_path / str(number) / "a.png")

    def labels() -> list[int] | None:
        images = images_to_judge_by(demo, f"folder:{tmp_path}")
        assert images is not None
        return None if images.labels is None else images.labels.tolist()

    assert labels() == [*range(10)]
    shutil.copytree(tmp_path / "9", tmp_path / "too many")
    with pytest.warns(CalibrationWarning, match="has 11 sub-folders"):
        assert labels() is None
    for name in ("5", "too many"):
        shutil.rmtree(tmp_path / name)
    with pytest.warns(CalibrationWarning, match=r"has 9 sub-folders, and `demo` 10 classes.* a labels\.csv"):
        assert labels() is None
    (tmp_path / "labels.csv").write_text("file,label\n9/a.png,7\n")
    assert labels() == [7]


@pytest.mark.parametrize("layer", ["blocks.0.attn.qkv", "blocks.1.mlp.fc2", "blocks.3.attn.proj"])
@pytest.mark.parametrize("site", ["input", "weight"])
def test_a_scale_that_is_off_by_two_percent_is_caught(bundle: Path, layer: str, site: str) -> None:
    _change(bundle, [f"{layer}.{site}.scale"], lambda scale: scale * np.float32(1.02))
    found = dfq.check(bundle, limit=8)
    assert found.verdict == "fail"
    assert f"layer {layer} is off" in found.reason


def test_a_layer_that_puts_out_another_size_is_named_with_what_to_spare(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = LayerCutter.run
    monkeypatch.setattr(LayerCutter, "run", lambda *args: np.concatenate([run(*args)] * 2))
    with pytest.raises(ExportError, match=r"`blocks\.0\.attn\.qkv` puts out") as raised:
        dfq.check(demo_bundle, limit=1)
    assert "--spare auto,blocks.0.attn.qkv" in raised.value.fix


def test_one_channels_scale_that_is_off_is_caught(bundle: Path) -> None:
    _change(bundle, ["blocks.2.mlp.fc1.weight.scale"], lambda scale: np.r_[scale[:5], scale[5] * 1.1, scale[6:]])
    assert dfq.check(bundle, limit=8).verdict == "fail"


def test_swapped_weights_of_two_layers_are_caught(bundle: Path) -> None:
    names = ["blocks.0.mlp.fc1.weight.int8", "blocks.2.mlp.fc1.weight.int8"]
    constants = ir.load(bundle / "model.onnx").graph.initializers
    stored = [value.numpy() for name in reversed(names) if (value := constants[name].const_value) is not None]
    _change(bundle, names, lambda _: stored.pop(0))
    found = dfq.check(bundle, limit=8)
    assert found.verdict == "fail"
    assert "layer blocks." in found.reason


def test_a_reference_under_a_plan_of_another_seed_is_caught(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "plan.safetensors"
    dfq.calibrate(dfq.Recipe(model="demo", generator="noise", count=8, refine="none", seed=1), other)
    shutil.copyfile(other, bundle / other.name)
    _reseal(bundle)
    assert dfq.check(bundle, limit=8).verdict == "fail"


def test_a_float_part_that_is_off_is_caught_although_every_layer_agrees(bundle: Path) -> None:
    _change(bundle, ["norm.weight"], lambda values: values * np.linspace(0.8, 1.2, values.size))
    found = dfq.check(bundle, limit=64)
    assert max(found.layer_error.values()) < 1e-5
    assert (found.verdict, found.reason[:20]) == ("fail", "every layer agrees, ")


def test_an_engine_that_puts_out_nan_is_caught_and_its_report_is_json(bundle: Path) -> None:
    _change(bundle, ["norm.weight"], lambda values: values * np.nan)
    found = dfq.check(bundle, limit=8)
    assert (found.verdict, found.reason) == ("fail", "the engine puts out NaN or Inf")
    assert _report(bundle)["distance"]["engine_reference"] is None


def test_a_layer_that_puts_out_nan_is_caught(bundle: Path) -> None:
    _change(bundle, ["blocks.2.mlp.fc1.bias"], lambda values: values * np.nan)
    found = dfq.check(bundle, limit=8)
    assert found.verdict == "fail"
    assert found.layer_error["blocks.2.mlp.fc1"] == np.inf


def test_too_few_images_are_undecided_and_the_interval_says_why(bundle: Path) -> None:
    _change(bundle, ["norm.weight"], lambda values: values * np.linspace(0.8, 1.2, values.size))
    found = dfq.check(bundle, limit=1)
    assert found.verdict == "undecided"
    assert found.reason.endswith("95 % interval 0.00 to inf): use more images")


def test_a_check_repeats_to_the_last_bit(bundle: Path) -> None:
    one, two = (dfq.check(bundle, limit=16).report() for _ in range(2))
    assert {**one, "stages": None} == {**two, "stages": None}  # which took what they took


_SHARES = {
    "top1": ("float", "reference", "engine"),
    "agreement": ("engine_reference", "engine_float", "noise_floor"),
}


@pytest.mark.parametrize("limit", [1, 3, 360])
def test_the_report_keeps_its_contract(bundle: Path, limit: int) -> None:
    if limit < 360:  # the fixture wrote the other one
        dfq.check(bundle, limit=limit)
    report = _report(bundle)
    assert report["n"] == limit
    for part, names in _SHARES.items():
        assert report[part].keys() == set(names)
        assert all(isinstance(value, float) and 0 <= value <= 100 for value in report[part].values())
    assert (report["engine"]["state"], report["engine"]["layers"]) == ("built", {"int8": 16, "fp32": 10})
    assert report["ran"] == "the engine"
    assert report["verdict"] == "pass"
    for name, (low, high) in report["intervals_95"].items():
        part, key = ("top1", name[5:]) if name.startswith("top1_") else ("agreement", name)
        assert low <= report[part][key] <= high


@pytest.fixture
def pending(bundle: Path) -> Path:
    """The bundle as if its engine had yet to be built."""
    facts = json.loads((bundle / MANIFEST).read_text())
    facts["engine"] |= {"state": "pending", "note": "TensorRT is not installed here.", "precision": {}, "reasons": {}}
    (bundle / MANIFEST).write_text(json.dumps(facts))
    return bundle


def test_an_engine_that_has_not_run_never_passes(pending: Path) -> None:
    found = dfq.check(pending, limit=16)
    assert found.verdict == "undecided"
    assert found.reason.startswith("the engine has not run: TensorRT is not installed here. But every layer")
    assert found.ran == _report(pending)["ran"] == "model.onnx in ONNX Runtime"
    assert found.layer_error.keys() == set(QuantPlan.load(pending / "plan.safetensors").layers)


@pytest.mark.parametrize("verdict", ["pass", "fail", "undecided"])
def test_a_stand_in_can_show_that_an_engine_is_wrong_not_that_it_is_right(
    demo_run: tuple[Path, Check], verdict: evaluate.Verdict
) -> None:
    found = evaluate._not_run(dataclasses.replace(demo_run[1], verdict=verdict, reason="so it is"), "there is no GPU.")
    assert found.verdict == ("undecided" if verdict == "pass" else verdict)
    assert found.reason == "the engine has not run: there is no GPU. But so it is"


@pytest.mark.parametrize("site", ["input", "weight"])
def test_a_wrong_model_fails_although_its_engine_has_not_run(pending: Path, site: str) -> None:
    _change(pending, [f"blocks.1.mlp.fc2.{site}.scale"], lambda scale: scale * np.float32(1.02))
    found = dfq.check(pending, limit=8)
    assert found.verdict == "fail"
    assert "layer blocks.1.mlp.fc2 is off" in found.reason


def test_a_pending_engine_without_a_note_does_not_pass_either(pending: Path) -> None:
    facts = json.loads((pending / MANIFEST).read_text())
    facts["engine"]["note"] = ""
    (pending / MANIFEST).write_text(json.dumps(facts))
    found = dfq.check(pending, limit=16)
    assert (found.verdict, found.ran) == ("undecided", "model.onnx in ONNX Runtime")


def test_a_wrong_float_part_fails_although_its_engine_has_not_run(pending: Path) -> None:
    _change(pending, ["norm.weight"], lambda values: values * np.linspace(0.8, 1.2, values.size))
    found = dfq.check(pending, limit=64)
    assert (found.verdict, found.reason.count("every layer agrees, but")) == ("fail", 1)


def test_a_built_engine_that_cannot_run_here_has_a_stand_in(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise NotHereError(what="there is no GPU.", why="none was found.", fix="go where one is.")

    monkeypatch.setattr(ort, "load", absent)
    found = dfq.check(bundle, limit=16)
    assert (found.verdict, found.ran, found.engine.state) == ("undecided", "model.onnx in ONNX Runtime", "built")
    assert found.reason.startswith("the engine has not run: there is no GPU: none was found. But every layer")


def test_an_engine_that_is_broken_has_no_stand_in(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise BackendError(what="the engine was made for another GPU.", why="it says so.", fix="build it again.")

    monkeypatch.setattr(ort, "load", broken)
    with pytest.raises(BackendError, match="made for another GPU"):
        dfq.check(bundle, limit=1)


def test_without_labels_there_is_no_accuracy(bundle: Path) -> None:
    (images,) = (bundle / "work").glob("images-*.safetensors")
    found = dfq.check(bundle, images=str(images))
    assert (found.n, found.top1, found.drop) == (8, None, None)
    assert _report(bundle)["top1"] is None


def test_the_plan_that_a_bundle_holds_is_the_one_that_is_checked(bundle: Path) -> None:
    plan = QuantPlan.load(bundle / "plan.safetensors")
    assert dfq.check(bundle, limit=1).layer_error.keys() == set(plan.layers)
