"""Collectors: each gives ranges of the same sites, ONNX Runtime's are ONNX Runtime's, and none hides a failure."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from onnxruntime.quantization import CalibrationMethod, create_calibrator
from onnxruntime.quantization.calibrate import HistogramCollector
from small_model import Failing, small_subject

import dfq_deploy as dfq
from calibrators.affine import CODES
from calibrators.collectors import Subject, ort, pytorch
from calibrators.errors import ImagesError, PlanError, RecipeError
from calibrators.images import ImageSet
from calibrators.interchange import ImageSetReader
from calibrators.plan import QuantPlan
from calibrators.ranges import Ranges
from calibrators.registry import names, pick
from calibrators.sites import sites_of
from calibrators.tensors import tensors_of
from dfq_deploy.building import float_onnx
from dfq_deploy.cli import run
from dfq_deploy.models.loading import load_model


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    model = load_model("demo")
    path = tmp_path_factory.mktemp("float") / "float.onnx"
    float_onnx(model, path)
    return Subject(model.module, model.fingerprint, path)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    model = load_model("demo")
    assert model.labelled is not None
    return pick("calibrators.sources", "npz").open_images(model.labelled, model.preprocess).spread(19)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, ImageSet]:
    return small_subject(tmp_path_factory.mktemp("small"))


def _close(found: Ranges, wanted: Ranges, tolerance: float) -> None:
    """Within `tolerance` of each range's own size."""
    assert list(found.sites) == list(wanted.sites)
    for name, seen in wanted.sites.items():
        again = found.sites[name]
        size = np.maximum(np.abs(seen.low), np.abs(seen.high)).max()
        np.testing.assert_allclose(again.low, seen.low, atol=tolerance * size, err_msg=name)
        np.testing.assert_allclose(again.high, seen.high, atol=tolerance * size, err_msg=name)
        assert (again.role, again.axis, again.shape) == (seen.role, seen.axis, seen.shape)
        assert again.low.dtype == again.high.dtype == np.float32


def test_onnxruntimes_minmax_is_ours_at_every_site(demo: Subject, images: ImageSet) -> None:
    wanted = pytorch.collect_ranges(demo, images, observer="minmax", percentile=99.9, codes=None)
    told: list[tuple[int, int]] = []
    found = ort.collect_ranges(
        demo, images, observer="minmax", percentile=99.9, codes=None, progress=lambda *at: told.append(at)
    )
    _close(found, wanted, 1e-4)
    assert any(name.endswith(".qk.rhs") for name in found.sites)
    assert (found.model, found.images, found.observer) == (
        demo.fingerprint,
        images.fingerprint,
        "ONNX Runtime's minmax",
    )
    assert told[-1] == (2 * len(images), 2 * len(images)) and told == sorted(told)


def test_a_percentile_means_the_same_to_both(demo: Subject, images: ImageSet) -> None:
    wanted, found = (
        collector.collect_ranges(demo, images, observer="percentile", percentile=99.5, codes=None)
        for collector in (pytorch, ort)
    )
    _close(found, wanted, 0.01)  # ONNX Runtime's bin is 1/1024 of the range, at batches that widen it more
    everything = ort.collect_ranges(demo, images, observer="minmax", percentile=99.5, codes=None)
    narrower = [name for name, seen in found.sites.items() if seen.high.max() < 0.9 * everything.sites[name].high.max()]
    assert len(narrower) > 10


def test_weights_and_fixed_ranges_are_the_models_whatever_the_observer(demo: Subject, images: ImageSet) -> None:
    wanted = pytorch.collect_ranges(demo, images, observer="minmax", percentile=99.9, codes=None)
    found = ort.collect_ranges(demo, images, observer="percentile", percentile=60, codes=None)
    for name, seen in wanted.sites.items():
        if seen.role == "weight" or name.endswith(".av.lhs"):
            np.testing.assert_array_equal(found.sites[name].high, seen.high)
    assert float(found.sites["blocks.0.attn.av.lhs"].high) == 1


def test_entropy_cuts_off_what_onnxruntimes_defaults_do_not(small: tuple[Subject, ImageSet], tmp_path: Path) -> None:
    subject, images = small
    assert subject.onnx is not None
    wide, cut = (
        ort.collect_ranges(subject, images, observer=name, percentile=99.9, codes=None).sites
        for name in ("minmax", "entropy")
    )
    calibrator = create_calibrator(subject.onnx, None, str(tmp_path / "a.onnx"), CalibrationMethod.Entropy)
    calibrator.collect_data(ImageSetReader(images, batch_size=10))
    default = calibrator.compute_data()["images"].range_value
    assert np.asarray(default).tolist() == [wide["stem.input"].low.item(), wide["stem.input"].high.item()]
    assert cut["stem.input"].high < 0.9 * wide["stem.input"].high
    assert cut["one.input"].high <= wide["one.input"].high


def test_layers_that_read_one_tensor_share_its_range(small: tuple[Subject, ImageSet]) -> None:
    subject, images = small
    assert subject.onnx is not None
    assert tensors_of(sites_of(subject.module), subject.onnx) == {
        "stem.input": "images",
        "stem.output": "stem.output",
        "one.input": "one.input",
        "two.input": "one.input",
    }
    sites = ort.collect_ranges(subject, images, observer="minmax", percentile=99.9, codes=None).sites
    assert sites["one.input"].high == sites["two.input"].high > 0
    assert sites["stem.output"].low < 0 == sites["one.input"].low


def test_nan_that_onnxruntime_passes_over_is_refused_by_site(small: tuple[Subject, ImageSet]) -> None:
    subject, images = small
    pixels = np.array(images.pixels[:20])
    pixels[13, 0, 5, 5] = np.nan
    with pytest.raises(PlanError, match=r"site `stem\.\w+`: the values for image 13 of test"):
        ort.collect_ranges(
            subject, dataclasses.replace(images, pixels=pixels), observer="minmax", percentile=99.9, codes=None
        )


def test_a_source_that_fails_never_shortens_calibration(small: tuple[Subject, ImageSet]) -> None:
    subject, images = small
    failure = ImagesError(what="the disk is gone.", why="a test.", fix="none.")
    failing = dataclasses.replace(images, pixels=Failing(np.array(images.pixels[:20]), failure, reads=1))
    with pytest.raises(ImagesError, match="the disk is gone"):
        ort.collect_ranges(subject, failing, observer="minmax", percentile=99.9, codes=None)


def test_another_models_onnx_is_refused(small: tuple[Subject, ImageSet], demo: Subject, tmp_path: Path) -> None:
    subject, images = small
    with pytest.raises(PlanError, match="has no node `stem`"):
        ort.collect_ranges(
            dataclasses.replace(subject, onnx=demo.onnx), images, observer="minmax", percentile=99.9, codes=None
        )
    (tmp_path / "float.onnx").write_bytes(b"\x00nothing")
    with pytest.raises(PlanError, match="cannot be read as an ONNX model"):
        tensors_of(["stem.input"], tmp_path / "float.onnx")


def test_onnxruntime_gets_one_batch_at_a_time_and_looks_at_the_sites_alone(
    small: tuple[Subject, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[dict[str, list[np.ndarray]]] = []
    collect = HistogramCollector.collect
    monkeypatch.setattr(HistogramCollector, "collect", lambda self, given: held.append(given) or collect(self, given))
    ort.collect_ranges(*small, observer="percentile", percentile=99.9, codes=None)
    assert [[len(batch) for batch in given["images"]] for given in held] == [[8], [8], [4]]
    assert all(set(given) == {"images", "stem.output", "one.input"} for given in held)


def test_the_recipe_offers_the_observers_of_all_collectors_together() -> None:
    offered = {name: pick("calibrators.collectors", name).OBSERVERS for name in names("calibrators.collectors")}
    assert set().union(*offered.values()) == {"minmax", "percentile", "entropy", "mse", "hessian"}
    for collector, observers in offered.items():
        for observer in observers:
            dfq.Recipe(model="demo", collector=collector, observer=observer)


@pytest.mark.parametrize("name", names("calibrators.collectors"))
def test_an_observer_that_a_collector_lacks_is_told_with_those_that_it_has(name: str) -> None:
    collector = pick("calibrators.collectors", name)
    with pytest.raises(RecipeError, match=f"`{name}` has no observer `huber`") as caught:
        collector.check("huber", CODES["int8"])
    assert all(observer in caught.value.why for observer in collector.OBSERVERS)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--collector", "ort", "--observer", "mse"], "`ort` has no observer `mse`"),
        (["--scheme", "w4a16", "--observer", "hessian"], "`hessian` has nothing to search"),
    ],
)
def test_the_command_line_refuses_an_observer_before_it_makes_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[str], told: str
) -> None:
    assert run(["calibrate", "--model", "demo", *asked, "--out", str(tmp_path / "plan.safetensors")]) == 3
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ranges_searched_for_one_format_are_not_used_for_another(tmp_path: Path) -> None:
    signed, asymmetric = (
        dfq.Recipe(model="demo", generator="noise", count=3, observer="mse", scheme=scheme)
        for scheme in ("w8a8", "w8a8_asym")
    )
    dfq.calibrate(signed, tmp_path / "plan.safetensors")
    after = dfq.calibrate(asymmetric, tmp_path / "plan.safetensors")
    (tmp_path / "fresh").mkdir()
    assert after.fingerprint == dfq.calibrate(asymmetric, tmp_path / "fresh" / "plan.safetensors").fingerprint


def test_each_observer_makes_its_own_ranges_and_says_what_they_depend_on(demo: Subject, images: ImageSet) -> None:
    found = {
        name: pytorch.collect_ranges(demo, images, observer=name, percentile=99.5, codes=CODES["int8"])
        for name in pytorch.OBSERVERS
    }
    assert [ranges.observer for ranges in found.values()] == [
        "minmax",
        "percentile 99.5",
        "entropy for int8",
        "mse for int8",
        "hessian for int8",
    ]
    for one, other in itertools.combinations(found.values(), 2):
        apart = {name for name, seen in one.sites.items() if not np.array_equal(seen.high, other.sites[name].high)}
        assert len(apart) > 5
        assert all(one.sites[name].role != "weight" and not name.endswith(".av.lhs") for name in apart)


def test_a_plan_calibrated_by_onnxruntime_is_nearly_ours_and_kept_apart(tmp_path: Path) -> None:
    plans = {}
    for collector in ("pytorch", "ort"):
        recipe = dfq.Recipe(model="demo", generator="noise", count=9, collector=collector, observer="minmax")
        plans[collector] = dfq.calibrate(recipe, tmp_path / "plan.safetensors")
    assert [q.codes for q in plans["ort"].sites.values()] == [q.codes for q in plans["pytorch"].sites.values()]
    for name, qparams in plans["pytorch"].sites.items():
        np.testing.assert_allclose(plans["ort"].sites[name].scale, qparams.scale, rtol=1e-3, err_msg=name)
    assert plans["ort"].fingerprint != plans["pytorch"].fingerprint
    assert QuantPlan.load(tmp_path / "plan.safetensors").fingerprint == plans["ort"].fingerprint
