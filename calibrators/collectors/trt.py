"""Ranges from TensorRT's INT8 calibrators, which TensorRT has up to version 10, on the float ONNX model and a GPU.

TensorRT builds an engine, asks for batches on the way, and hands out its calibration cache; the cache is what counts
here, the engine is dropped. What would make calibration go wrong in silence is dealt with: the binding prints and
drops an exception of `get_batch` and takes it for the end of the images, so it is kept and raised afterwards; TensorRT
gets an address and takes the size of a batch from the calibration profile, so all batches have that size; and the
torch model sees the images first and refuses NaN. TensorRT 11 has no calibrators.

Source: `IInt8EntropyCalibrator2` and `IInt8MinMaxCalibrator`, python/src/infer/pyInt8.cpp in NVIDIA/TensorRT.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from calibrators.affine import Codes
from calibrators.calibration_cache import read_cache
from calibrators.collectors import Subject, check_observer
from calibrators.errors import BackendError
from calibrators.images import ImageSet
from calibrators.interchange import INPUT
from calibrators.observing import observed_for
from calibrators.ranges import Ranges

try:
    import tensorrt as trt
except ImportError:
    trt = None
try:
    from cuda.bindings import runtime as cudart
except ImportError:
    cudart = None

__all__ = ["NEEDS_ONNX", "OBSERVERS", "check", "collect_ranges"]

_CALIBRATORS = {"entropy": "IInt8EntropyCalibrator2", "minmax": "IInt8MinMaxCalibrator"}
OBSERVERS = tuple(_CALIBRATORS)
NEEDS_ONNX = True
_LARGEST_BATCH = 16


def check(observer: str, codes: Codes | None) -> None:  # noqa: ARG001, its observers are for INT8
    """Nothing, if TensorRT can calibrate here with `observer`.

    Raises:
        RecipeError: There is no such observer.
        BackendError: TensorRT is missing, has no calibrators, or finds no GPU.
    """
    check_observer("trt", observer, OBSERVERS)
    if trt is None or cudart is None:
        missing = "tensorrt" if trt is None else "cuda.bindings"
        raise BackendError(
            what="the collector `trt` cannot run here.",
            why=f"the Python package `{missing}` is not installed.",
            fix=f"pip install {'tensorrt==10.*' if trt is None else 'cuda-bindings'}, or use another --collector.",
        )
    if not hasattr(trt, _CALIBRATORS[observer]):
        raise BackendError(
            what=f"TensorRT {trt.__version__} cannot calibrate.",
            why="from version 11 on TensorRT has no calibrators; scales are written in the ONNX model.",
            fix="use --collector pytorch, whose plan becomes explicit Q/DQ.",
        )
    error, count = cudart.cudaGetDeviceCount()
    if error != cudart.cudaError_t.cudaSuccess or not count:
        raise BackendError(
            what="the collector `trt` cannot run here.",
            why=f"TensorRT calibrates on a GPU, and CUDA finds none ({error.name}).",
            fix="run it where a GPU and its driver are, or use --collector pytorch.",
        )


def collect_ranges(
    subject: Subject,
    images: ImageSet,
    *,
    observer: str,
    percentile: float,  # noqa: ARG001, a setting of observers that this collector does not have
    codes: Codes | None,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> Ranges:
    """Ranges of every site that `images` reach; those of activations are TensorRT's scales, exactly, in float64.

    Raises:
        BackendError: TensorRT cannot calibrate here, cannot build the model, or left out images.
        PlanError: NaN or Inf passed a site, or the cache has no scale for one.
    """
    check(observer, codes)
    assert subject.onnx is not None
    n = len(images)
    seen, tensors = observed_for(subject, images, progress)
    with _DeviceBatch() as device, tempfile.TemporaryDirectory() as folder:
        feed = _subclassed(_Feed, _CALIBRATORS[observer])(images, device, lambda done: progress(n + done, 2 * n))
        _build(subject.onnx, feed)
        cache = Path(folder) / "calibration.cache"
        cache.write_bytes(feed.result())
        found = read_cache(cache, tensors, model=subject.fingerprint, images=images.fingerprint)
    for site, given in found.sites.items():
        seen[site] = dataclasses.replace(seen[site], low=given.low, high=given.high)
    return dataclasses.replace(found, sites=seen)


class _Feed:
    """What TensorRT calls back; to be a calibrator, it is combined with one of TensorRT's classes."""

    def __init__(self, images: ImageSet, device: "_DeviceBatch", progress: Callable[[int], object]) -> None:
        super().__init__()
        self.size = max(size for size in range(1, _LARGEST_BATCH + 1) if len(images) % size == 0)
        self.images = images
        self._batches = images.batches(self.size)
        self._device, self._progress = device, progress
        self._fed = 0
        self.failure: BaseException | None = None
        self._cache: bytes | None = None

    def get_batch_size(self) -> int:
        return self.size

    def get_batch(self, names: list[str]) -> list[int] | None:
        """The next batch's address on the GPU, None after the last and after a failure."""
        try:
            assert names == [INPUT]
            batch = next(self._batches, None)
            if batch is None:
                return None
            address = self._device.filled_with(batch)
            self._fed += len(batch)
            self._progress(self._fed)
        except BaseException as failure:  # the binding would drop it, an interrupt too
            self.failure = failure
            return None
        return [address]

    def read_calibration_cache(self) -> None:
        """None: calibrate."""

    def write_calibration_cache(self, cache: Any) -> None:
        self._cache = bytes(cache)

    def result(self) -> bytes:
        """The cache, if it is of all the images.

        Raises:
            BackendError: It is not; what failed in `get_batch` is raised as it is.
        """
        if self.failure is not None:
            raise self.failure
        if self._fed != len(self.images) or self._cache is None:
            raise BackendError(
                what=f"TensorRT calibrated on {self._fed} of {len(self.images)} images.",
                why="it did not ask for more." if self._cache else "it gave no calibration cache.",
                fix="use --collector pytorch, and report this model.",
            )
        return self._cache


class _Log:
    """TensorRT's errors, kept for the message."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
            self.errors.append(message)


class _DeviceBatch:
    """One batch in the GPU's memory, which is taken with the first one and kept until the end."""

    def __init__(self) -> None:
        self._address: int | None = None

    def __enter__(self) -> "_DeviceBatch":
        return self

    def __exit__(self, *_: object) -> None:
        if self._address is not None:
            _cuda(cudart.cudaFree(self._address))

    def filled_with(self, batch: np.ndarray) -> int:
        """The address of a copy of `batch`; all batches must be of one size."""
        batch = np.ascontiguousarray(batch, np.float32)
        if self._address is None:
            (self._address,) = _cuda(cudart.cudaMalloc(batch.nbytes))
        assert self._address is not None
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        _cuda(cudart.cudaMemcpy(self._address, batch.ctypes.data, batch.nbytes, kind))
        return self._address


def _cuda(returned: tuple[Any, ...]) -> tuple[Any, ...]:
    error, *values = returned
    if error != cudart.cudaError_t.cudaSuccess:
        raise BackendError(
            what="a calibration batch could not be put on the GPU.",
            why=f"CUDA says {error.name}.",
            fix="free memory on the GPU, or use --collector pytorch.",
        )
    return tuple(values)


def _subclassed(ours: type, theirs: str) -> Any:
    """`ours` as a subclass of TensorRT's class `theirs`, which may be missing when this file is imported."""
    return type(ours.__name__, (ours, getattr(trt, theirs)), {})


def _build(onnx: Path, feed: Any) -> None:
    """Let TensorRT build an INT8 engine of the model `onnx`, calibrated on `feed`."""
    log = _subclassed(_Log, "ILogger")()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        raise _refused([parser.get_error(index).desc() for index in range(parser.num_errors)])
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.INT8)
    config.int8_calibrator = feed
    profile = builder.create_optimization_profile()
    shape = (feed.size, *feed.images.preprocess.shape)
    profile.set_shape(INPUT, shape, shape, shape)
    config.add_optimization_profile(profile)
    config.set_calibration_profile(profile)
    if builder.build_serialized_network(network, config) is None:
        raise feed.failure or _refused(log.errors)


def _refused(errors: list[str]) -> BackendError:
    return BackendError(
        what="TensorRT cannot build the float model, which it does to calibrate.",
        why=f"{(errors or ['it does not say why'])[0]}.",
        fix="use --collector pytorch, and report this model.",
    )
