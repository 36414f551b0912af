"""Whole exports for the GPU: each engine against its reference, and against ONNX Runtime's CPU on the same file."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import dfq_deploy as dfq
from calibrators.images import ImageSet
from exporters.tensorrt import cuda

pytestmark = pytest.mark.gpu

_BACKENDS: dict[str, dict[str, Any]] = {
    "ort-cuda": {"backend": "ort", "provider": "cuda"},
    "trt": {"backend": "trt"},
    "rtx": {"backend": "rtx"},
}
_FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"scheme": "w8a8"},
    "fp16-int8": {"scheme": "w8a8", "float": "fp16"},
    "fp16-int4": {"scheme": "w4a16", "float": "fp16"},
    "fp16-fp8": {"scheme": "w8a8_fp8", "float": "fp16"},
}
_MODELS: dict[str, dict[str, Any]] = {
    "demo": {"model": "demo"},
    "test_vit": {"model": "test_vit", "random_weights": True},
}
_FARTHEST = 0.02  # mean |a - b|² / |b|²: rounding flips of 8-bit codes compound to some thousandths in a small ViT


@pytest.fixture(scope="module", params=_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "ort-cuda":
        try:
            version("onnxruntime-gpu")
        except PackageNotFoundError:
            pytest.skip("onnxruntime-gpu is not installed")
        return str(request.param)
    name = {"trt": "tensorrt", "rtx": "tensorrt_rtx"}[request.param]
    module = pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)
    here = cuda.require().capability.upper()
    if hasattr(module, "ComputeCapability") and here not in module.ComputeCapability.__members__:
        pytest.skip(f"{name} {module.__version__} does not run on {here}")
    return str(request.param)


@pytest.fixture(scope="module", params=_MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=_FORMATS)
def bundle(
    request: pytest.FixtureRequest, backend: str, model: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A bundle, and the verdict of its own check against the reference."""
    if backend == "ort-cuda" and request.param != "fp16-int4":
        pytest.skip("ONNX Runtime's CUDA provider has no INT8 or FP8 matmul")
    if request.param.endswith("fp8") and int(cuda.require().capability.removeprefix("sm")) < 89:
        pytest.skip("FP8 needs a GPU of sm89 or newer")
    folder = tmp_path_factory.mktemp(backend) / "bundle"
    options = {**_BACKENDS[backend], **_MODELS[model], **_FORMATS[request.param]}
    found = dfq.export(dfq.Recipe(generator="noise", count=8, **options), folder, limit=64)
    return folder, f"{found.verdict}: {found.reason}"


def _images(folder: Path) -> np.ndarray:
    (file,) = (folder / "work").glob("images-*.safetensors")
    return ImageSet.load(file).pixels


def test_the_engine_is_no_further_from_its_reference_than_the_noise_floor(bundle: tuple[Path, str]) -> None:
    assert bundle[1].startswith("pass"), bundle[1]


def test_the_engine_answers_as_onnx_runtime_does_on_the_same_file(bundle: tuple[Path, str]) -> None:
    images = _images(bundle[0])
    oracle = onnxruntime.InferenceSession(str(bundle[0] / "model.onnx"), providers=["CPUExecutionProvider"])
    with dfq.load(bundle[0]) as runner:
        for n in (1, 3, len(images)):
            expected = oracle.run(None, {"images": images[:n]})[0]
            found = runner(images[:n])
            distance = np.sum((found - expected) ** 2, axis=1) / np.sum(expected**2, axis=1)
            assert distance.mean() < _FARTHEST
