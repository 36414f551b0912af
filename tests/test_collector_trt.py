"""The TensorRT collector, as far as a machine with neither TensorRT nor a GPU shows it.

TensorRT is the recorded surface of 10.16. Its builder is put in place by each test and only calls the calibrator back
the way that the binding does, exceptions dropped included; the cache that it hands over is the test's, not calibrated.
"""

import ctypes
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from small_model import Failing, small_subject
from surfaces import given, made, surface

from calibrators.collectors import Subject, trt
from calibrators.errors import BackendError, DeployError, ImagesError, PlanError
from calibrators.images import ImageSet
from calibrators.plan import make_plan
from calibrators.scheme import SCHEMES
from dfq_deploy.cli import run

cudart = pytest.importorskip("cuda.bindings.runtime")

CACHE = (
    "TRT-101601-EntropyCalibration2\n"
    "images: 3c008912\nstem.output: 3d018306\none.input: 3c88edfc\n(Unnamed Layer* 4) [Shuffle]_output: 0\n"
)
SUCCESS = (cudart.cudaError_t.cudaSuccess,)


class _Gpu:
    """CUDA's calls on host memory: what was copied to which address, and whether all was given back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.copied: list[np.ndarray] = []
        self.taken: set[int] = set()
        self.out_of_memory = False
        monkeypatch.setattr(cudart, "cudaGetDeviceCount", lambda: (*SUCCESS, 1))
        monkeypatch.setattr(cudart, "cudaMalloc", self._malloc)
        monkeypatch.setattr(cudart, "cudaMemcpy", self._memcpy)
        monkeypatch.setattr(cudart, "cudaFree", self._free)

    def _malloc(self, size: int) -> tuple[Any, ...]:
        if self.out_of_memory:
            return cudart.cudaError_t.cudaErrorMemoryAllocation, None
        self.memory = np.zeros(size, np.uint8)
        self.taken.add(self.memory.ctypes.data)
        return *SUCCESS, self.memory.ctypes.data

    def _memcpy(self, target: int, source: int, size: int, kind: Any) -> tuple[Any, ...]:
        assert kind == cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        assert target in self.taken and size == len(self.memory)
        ctypes.memmove(target, source, size)
        self.copied.append(self.memory.view(np.float32).copy())
        return SUCCESS

    def _free(self, address: int) -> tuple[Any, ...]:
        self.taken.remove(address)
        return SUCCESS


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, ImageSet]:
    return small_subject(tmp_path_factory.mktemp("small"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> _Gpu:
    return _Gpu(monkeypatch)


def _called_back(calibrator: Any, batches: int | None = None) -> None:
    """What the binding does while TensorRT calibrates: an exception counts as the end of the images."""
    assert calibrator.read_calibration_cache() is None
    while batches is None or batches > 0:
        try:
            given = calibrator.get_batch(["images"])
        except BaseException:
            given = None
        if not given:
            break
        batches = None if batches is None else batches - 1
    calibrator.write_calibration_cache(memoryview(CACHE.encode()))


@pytest.fixture
def ten(monkeypatch: pytest.MonkeyPatch, gpu: _Gpu) -> Iterator[Any]:
    """TensorRT 10.16 whose builder calls the calibrator back and gives an engine of no bytes."""
    module = surface("tensorrt-10.16")
    config = made(module.IBuilderConfig)
    module.Builder.create_network = lambda self, flags: made(module.INetworkDefinition)
    module.Builder.create_builder_config = lambda self: config
    module.Builder.create_optimization_profile = lambda self: made(module.IOptimizationProfile)
    module.OnnxParser.parse_from_file = lambda self, path: True
    module.IBuilderConfig.set_flag = lambda self, flag: None
    module.IBuilderConfig.add_optimization_profile = lambda self, profile: 0
    module.IBuilderConfig.set_calibration_profile = lambda self, profile: True
    module.IOptimizationProfile.set_shape = lambda self, name, low, best, high: None

    def build(self: Any, network: Any, given: Any) -> Any:
        _called_back(given.int8_calibrator)
        return made(module.IHostMemory, nbytes=0)

    module.Builder.build_serialized_network = build
    monkeypatch.setattr(trt, "trt", module)
    yield module
    assert not gpu.taken


def _collect(small: tuple[Subject, ImageSet], observer: str = "entropy", **changes: Any) -> Any:
    subject, images = small
    return trt.collect_ranges(
        subject, dataclasses.replace(images, **changes), observer=observer, percentile=99.9, codes=None
    )


@pytest.mark.parametrize("observer", trt.OBSERVERS)
def test_every_image_reaches_the_gpu_once_in_batches_of_the_profile(
    small: tuple[Subject, ImageSet], ten: Any, gpu: _Gpu, observer: str
) -> None:
    found = _collect(small, observer)
    np.testing.assert_array_equal(np.concatenate(gpu.copied).reshape(20, 1, 16, 16), small[1].pixels[:20])
    calls = dict(ten.calls)
    assert calls["IOptimizationProfile.set_shape"] == ("images", *[(10, 1, 16, 16)] * 3)
    assert calls["IBuilderConfig.set_flag"] == (ten.BuilderFlag.INT8,)
    assert calls["Builder.create_network"] == (1,)  # explicit batch, and not strongly typed
    assert calls["OnnxParser.parse_from_file"] == (str(small[0].onnx),)
    assert calls["IBuilderConfig.add_optimization_profile"] == calls["IBuilderConfig.set_calibration_profile"]
    calibrator = calls["Builder.build_serialized_network"][1].int8_calibrator
    assert isinstance(calibrator, ten.IInt8EntropyCalibrator2 if observer == "entropy" else ten.IInt8MinMaxCalibrator)
    assert calibrator.get_batch_size() == 10
    assert found.images == small[1].fingerprint


def test_the_plan_has_tensorrts_own_scales(small: tuple[Subject, ImageSet], ten: Any) -> None:
    found = _collect(small)
    plan = make_plan(found, SCHEMES["w8a8"])
    scales = {name: q.scale.tobytes()[::-1].hex() for name, q in plan.sites.items() if q.axis is None}
    assert scales == {
        "stem.output": "3d018306",
        "stem.input": "3c008912",
        "one.input": "3c88edfc",
        "two.input": "3c88edfc",
    }
    weight = np.abs(small[0].module.get_submodule("one").weight.numpy()).max(1)
    np.testing.assert_array_equal(plan.sites["one.weight"].scale, weight / np.float32(127))
    assert found.observer == "EntropyCalibration2 of TensorRT 101601"
    assert found.sites["one.input"].shape == (196, 4)


def test_a_prime_number_of_images_goes_one_by_one(small: tuple[Subject, ImageSet], ten: Any, gpu: _Gpu) -> None:
    _collect(small, pixels=np.array(small[1].pixels[:19]))
    assert [len(batch) for batch in gpu.copied] == [256] * 19


@pytest.mark.parametrize("failure", [ImagesError(what="the disk is gone.", why="a.", fix="b."), KeyboardInterrupt()])
def test_a_source_that_fails_raises_though_the_binding_drops_it(
    small: tuple[Subject, ImageSet], ten: Any, failure: BaseException
) -> None:
    pixels = Failing(np.array(small[1].pixels[:20]), failure, reads=1)
    with pytest.raises(type(failure)) as caught:
        _collect(small, pixels=pixels)
    assert caught.value is failure


def _builds(ten: Any, then: Callable[[Any], Any]) -> None:
    ten.Builder.build_serialized_network = lambda self, network, config: then(config.int8_calibrator)


def test_calibration_on_fewer_images_is_refused(small: tuple[Subject, ImageSet], ten: Any) -> None:
    _builds(ten, lambda calibrator: _called_back(calibrator, batches=1) or "engine")
    with pytest.raises(BackendError, match="calibrated on 10 of 20 images"):
        _collect(small)


def test_a_build_with_no_cache_is_refused(small: tuple[Subject, ImageSet], ten: Any) -> None:
    _builds(ten, lambda calibrator: [calibrator.get_batch(["images"]) for _ in range(3)])
    with pytest.raises(BackendError, match="calibrated on 20 of 20") as caught:
        _collect(small)
    assert caught.value.why == "it gave no calibration cache."


def test_the_gpus_memory_running_out_is_told(small: tuple[Subject, ImageSet], ten: Any, gpu: _Gpu) -> None:
    gpu.out_of_memory = True
    with pytest.raises(BackendError, match="could not be put on the GPU") as caught:
        _collect(small)
    assert "cudaErrorMemoryAllocation" in caught.value.why


def test_a_model_that_tensorrt_cannot_parse_or_build_is_told_with_its_reason(
    small: tuple[Subject, ImageSet], ten: Any
) -> None:
    def build(self: Any, network: Any, config: Any) -> None:
        logger = next(arguments for name, arguments in ten.calls if name == "Builder")[0]
        logger.log(ten.ILogger.INFO, "nothing to see")
        logger.log(ten.ILogger.ERROR, "no tactic for stem")

    ten.Builder.build_serialized_network = build
    with pytest.raises(BackendError, match="cannot build") as caught:
        _collect(small)
    assert caught.value.why == "no tactic for stem."
    ten.OnnxParser.parse_from_file = lambda self, path: False
    ten.OnnxParser.get_error = lambda self, index: made(ten.ParserError)
    ten.ParserError.desc = lambda self: "no importer for Gelu"
    given(ten.OnnxParser, num_errors=1)
    with pytest.raises(BackendError) as caught:
        _collect(small)
    assert caught.value.why == "no importer for Gelu."


def test_a_cache_that_lacks_a_site_is_refused(small: tuple[Subject, ImageSet], ten: Any) -> None:
    def build(calibrator: Any) -> str:
        _called_back(calibrator)
        calibrator.write_calibration_cache(CACHE.replace("one.input", "other").encode())
        return "engine"

    _builds(ten, build)
    with pytest.raises(PlanError, match=r"has no scale for `one\.input`"):
        _collect(small)


def _three_lines(error: DeployError, named: str) -> None:
    what, why, fix = str(error).splitlines()
    assert named in what + why + fix and len(why) > 10 and len(fix) > 10


@pytest.mark.parametrize("name", ["tensorrt-11.4", "tensorrt_rtx-1.7"])
def test_tensorrt_11_is_refused_and_told_what_to_use(monkeypatch: pytest.MonkeyPatch, gpu: _Gpu, name: str) -> None:
    monkeypatch.setattr(trt, "trt", surface(name))
    with pytest.raises(BackendError, match="cannot calibrate") as caught:
        trt.check("entropy", None)
    _three_lines(caught.value, "--collector pytorch, whose plan becomes explicit Q/DQ")


def test_a_machine_with_no_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, ten: Any) -> None:
    monkeypatch.setattr(cudart, "cudaGetDeviceCount", lambda: (cudart.cudaError_t.cudaErrorNoDevice, None))
    with pytest.raises(BackendError, match="cannot run here") as caught:
        trt.check("minmax", None)
    _three_lines(caught.value, "cudaErrorNoDevice")


@pytest.mark.parametrize(("part", "named"), [("trt", "tensorrt"), ("cudart", "cuda.bindings")])
def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, ten: Any, capsys: pytest.CaptureFixture[str], tmp_path: Any, part: str, named: str
) -> None:
    monkeypatch.setattr(trt, part, None)
    arguments = ["--model", "demo", "--collector", "trt", "--observer", "minmax", "--out", str(tmp_path / "p")]
    assert run(["calibrate", *arguments]) == 3
    assert f"`{named}` is not installed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
