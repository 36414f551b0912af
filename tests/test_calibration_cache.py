"""TensorRT's calibration cache: the bytes are golden, a plan and a cache are the same facts, damage is refused.

`golden/samples.cache` holds lines of caches that TensorRT wrote: of NVIDIA's sampleINT8 and of public issues.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import small_plan, small_ranges

from calibrators.affine import CODES, choose_qparams
from calibrators.calibration_cache import read_cache, write_cache
from calibrators.errors import DeployError, PlanError, RecipeError
from calibrators.plan import QuantPlan, make_plan
from calibrators.ranges import Ranges
from calibrators.scheme import SCHEMES

GOLDEN = Path(__file__).parent / "golden"
TENSORS = {
    "stem.input": "images",
    "stem.output": "stem.output",
    "attn.qk.lhs": "attn.qk.lhs",
    "attn.av.lhs": "attn.av.lhs",
    "head.input": "head.input",
}
BOUNDS = st.floats(-(2.0**100), 2.0**100, width=32)
HEADER = "TRT-101601-EntropyCalibration2\n"


def symmetric_plan() -> QuantPlan:
    return make_plan(small_ranges(), SCHEMES["w8a8"], attention=True)


def _read(path: Path, tensors: dict[str, str]) -> Ranges:
    return read_cache(path, tensors, model="m" * 64, images="i" * 64)


def _plan_of(ranges: Ranges) -> QuantPlan:
    return make_plan(ranges, SCHEMES["w8a8"], attention=True)


@pytest.mark.parametrize(
    ("golden", "version", "algorithm"),
    [
        ("trt-10.16.1-entropy.cache", "10.16.1", "entropy"),
        ("trt-10.3.0-minmax.cache", "10.3.0.26", "minmax"),
        ("trt-8.6.1-entropy.cache", "8.6.1", "entropy"),
    ],
)
def test_the_bytes_of_a_cache_are_golden(tmp_path: Path, golden: str, version: str, algorithm: str) -> None:
    write_cache(symmetric_plan(), tmp_path / "out.cache", tensors=TENSORS, version=version, algorithm=algorithm)
    assert (tmp_path / "out.cache").read_bytes() == (GOLDEN / golden).read_bytes()


def test_a_cache_that_tensorrt_wrote_reads_as_its_scales(tmp_path: Path) -> None:
    tensors = {"a.input": "data", "b.input": "conv1", "c.input": "pool1", "d.output": "onnx::Conv_329"}
    ranges = _read(GOLDEN / "samples.cache", tensors)
    assert ranges.observer == "EntropyCalibration2 of TensorRT 7000"
    assert {name: seen.role for name, seen in ranges.sites.items()} == {
        "a.input": "input",
        "b.input": "input",
        "c.input": "input",
        "d.output": "output",
    }
    assert float(ranges.sites["a.input"].high) == pytest.approx(0.99633, abs=1e-5)  # MNIST's pixels reach 1
    scale = _plan_of(ranges).sites["a.input"].scale
    assert scale.tobytes()[::-1].hex() == "3c008912"


def test_a_plan_comes_back_from_its_cache_scale_by_scale(tmp_path: Path) -> None:
    plan, path = symmetric_plan(), tmp_path / "plan.cache"
    write_cache(plan, path, tensors=TENSORS)
    again = _plan_of(_read(path, TENSORS))
    assert list(again.sites) == list(TENSORS)
    for site, qparams in again.sites.items():
        np.testing.assert_array_equal(qparams.scale, plan.sites[site].scale, strict=True)
        np.testing.assert_array_equal(qparams.zero_point, plan.sites[site].zero_point, strict=True)
    assert (again.model, again.images) == (plan.model, plan.images)


@settings(max_examples=200, deadline=None)
@given(bits=st.lists(st.integers(0x00800000, 0x7F7FFFFF), min_size=1, max_size=20))
def test_any_cache_comes_back_byte_for_byte(tmp_path_factory: pytest.TempPathFactory, bits: list[int]) -> None:
    path = tmp_path_factory.mktemp("cache") / "in.cache"
    path.write_text(HEADER + "".join(f"layer.{i}.input: {word:08x}\n" for i, word in enumerate(bits)))
    sites = {f"layer.{i}.input": f"layer.{i}.input" for i in range(len(bits))}
    ranges = _read(path, sites)
    ranges.save(path.with_name("ranges"))
    write_cache(_plan_of(Ranges.load(path.with_name("ranges"))), path.with_name("out.cache"))
    assert path.with_name("out.cache").read_bytes() == path.read_bytes()


@settings(max_examples=300, deadline=None)
@given(low=BOUNDS, high=BOUNDS, codes=st.sampled_from(["int8", "uint8"]))
def test_float32_bounds_give_the_scale_that_float32_arithmetic_gives(low: float, high: float, codes: str) -> None:
    ends = np.float32([min(low, 0), max(high, 0)])
    span, steps = (np.abs(ends).max(), 127) if codes == "int8" else (ends[1] - ends[0], 255)
    scale = choose_qparams(np.float32(low), np.float32(high), CODES[codes])[0]
    expected = span / np.float32(steps)
    assert scale.dtype == np.float32
    assert scale == (expected if expected >= np.finfo(np.float32).tiny else 1)


def test_two_sites_that_share_a_tensor_share_a_line(tmp_path: Path) -> None:
    path, plan = tmp_path / "shared.cache", symmetric_plan()
    q = plan.sites["head.input"]
    shared = dataclasses.replace(plan, sites={"a.input": q, "b.input": q})
    write_cache(shared, path, tensors={"a.input": "x: y", "b.input": "x: y"})
    assert path.read_text() == f"{HEADER}x: y: {q.scale.view(np.uint32):08x}\n"
    assert set(_read(path, {"a.input": "x: y", "b.input": "x: y"}).sites) == {"a.input", "b.input"}
    other = dataclasses.replace(q, scale=q.scale * 2)
    clash = dataclasses.replace(plan, sites={"a.input": q, "b.input": other})
    with pytest.raises(PlanError, match=r"`x` has two scales, one of them at `b\.input`") as caught:
        write_cache(clash, path, tensors={"a.input": "x", "b.input": "x"})
    assert "--observer percentile --refine none" in caught.value.fix


def _three_lines(error: DeployError, *named: str) -> None:
    what, why, fix = str(error).splitlines()
    assert len(why) > len("  why: ") and len(fix) > len("  fix: ")
    assert all(name in what + why for name in named)


def test_a_plan_without_activations_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="quantizes no activation") as caught:
        write_cache(QuantPlan({}, {}, "w4a16", "m", "i"), tmp_path / "cache")
    assert "w4a16 leaves them in float" in caught.value.why
    assert not (tmp_path / "cache").exists()


def test_an_asymmetric_plan_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        write_cache(small_plan(), tmp_path / "plan.cache")
    _three_lines(caught.value, "`stem.input`")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("version", "algorithm"), [("ten", "entropy"), ("10.16", "entropy"), ("10.16.1", "mse")])
def test_an_unknown_version_or_algorithm_is_refused(tmp_path: Path, version: str, algorithm: str) -> None:
    with pytest.raises(RecipeError) as caught:
        write_cache(symmetric_plan(), tmp_path / "plan.cache", version=version, algorithm=algorithm)
    _three_lines(caught.value, version, algorithm)


GOOD = HEADER + "a.input: 3c008912\nb.input: 3c008913\n"
DAMAGES = {
    "empty": "",
    "another file": "PK\x03\x04",
    "no version": "TRT--EntropyCalibration2\na.input: 3c008912\nb.input: 3c008913\n",
    "a legacy calibrator": GOOD.replace("EntropyCalibration2", "LegacyCalibration"),
    "no header": GOOD.removeprefix(HEADER),
    "bad digits": GOOD.replace("3c008912", "3c00891g"),
    "cut in a scale": GOOD[:-2],
    "cut in a name": GOOD[:-12],
    "cut between lines": GOOD[: GOOD.index("b.input")],
    "an empty line": GOOD.replace("\nb", "\n\nb"),
    "twice the same tensor": GOOD + "a.input: 3c008912\n",
    "NaN": GOOD.replace("3c008912", "7fc00000"),
    "infinite": GOOD.replace("3c008912", "7f800000"),
    "negative": GOOD.replace("3c008912", "bc008912"),
    "zero": GOOD.replace("3c008912", "0"),
    "below what float32 divides by": GOOD.replace("3c008912", "00000001"),
    "decimal": GOOD.replace("3c008912", "0.00784"),
}


def test_the_cache_that_the_damages_start_from_is_whole(tmp_path: Path) -> None:
    (tmp_path / "t.cache").write_text(GOOD)
    assert len(_read(tmp_path / "t.cache", {"a.input": "a.input", "b.input": "b.input"}).sites) == 2


@pytest.mark.parametrize("text", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_cache_is_refused_in_three_lines(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.cache"
    path.write_text(text)
    with pytest.raises(PlanError) as caught:
        _read(path, {"a.input": "a.input", "b.input": "b.input"})
    _three_lines(caught.value, str(path))


def test_a_cache_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.cache").write_bytes(b"\xff\xfe\x00")
    for name in ("binary.cache", "missing.cache"):
        with pytest.raises(PlanError, match=r"no whole calibration cache"):
            _read(tmp_path / name, {})


def test_another_models_cache_is_refused_by_the_tensor_that_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no scale for `fc9`, and 0 more"):
        _read(GOLDEN / "samples.cache", {"a.input": "data", "b.input": "fc9"})
