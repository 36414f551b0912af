"""A model in ONNX Runtime: the session, its options, and what its execution providers are told.

Whether a provider is there is asked of the session: ONNX Runtime's list has what was compiled in, with and without a
driver.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import platformdirs

from calibrators.errors import BackendError, NotHereError
from calibrators.files import fingerprint_of, sha256_of
from exporters.backends import BuildOptions
from exporters.outputs import rows_of

__all__ = ["PROVIDERS", "TENSORRT", "OrtEngine", "cannot_load", "provider_options", "session_options"]

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "rtx": "NvTensorRTRTXExecutionProvider",
}
TENSORRT = ("tensorrt", "rtx")
_FORMATS = {
    "int8": onnx.TensorProto.INT8,
    "fp16": onnx.TensorProto.FLOAT16,
    "bf16": onnx.TensorProto.BFLOAT16,
}


class OrtEngine:
    """A model in ONNX Runtime.

    Attributes:
        provider: What really runs it: `cpu`, `cuda`, `tensorrt` or `rtx`.
    """

    def __init__(
        self,
        model: Path,
        provider: str,
        options: BuildOptions | None = None,
        *,
        exact: bool = False,
        threads: int | None = None,
    ) -> None:
        if provider not in PROVIDERS:
            raise BackendError(
                what=f"there is no provider named `{provider}`.",
                why=f"this backend has {', '.join(PROVIDERS)}.",
                fix="pass one of those.",
            )
        self.provider = provider
        wanted = PROVIDERS[provider]
        if wanted not in onnxruntime.get_available_providers():
            raise _not_here(provider, onnxruntime.get_available_providers())
        chosen: list[Any] = [(wanted, provider_options(provider, model, options or BuildOptions()))]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a missing provider, which is an error below
                self._session: onnxruntime.InferenceSession | None = onnxruntime.InferenceSession(
                    str(model),
                    session_options(exact=exact, threads=threads),
                    providers=chosen if provider == "cpu" else [*chosen, PROVIDERS["cpu"]],
                )
        except Exception as cause:  # ONNX Runtime's own errors have no common base class
            raise cannot_load(model, cause) from cause
        if wanted not in self._session.get_providers():
            raise _not_here(provider, self._session.get_providers())

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The model's outputs side by side, (N, numbers) float32, of images (N, C, H, W) float32."""
        session = self._session  # close() in another thread does not free it under this call
        if session is None:
            raise BackendError(what="the engine is closed.", why="close() was called.", fix="load it again.")
        return rows_of(session.run(None, {"images": images}))

    def close(self) -> None:
        """Free the session."""
        self._session = None


def session_options(*, exact: bool = False, threads: int | None = None) -> onnxruntime.SessionOptions:
    """Options of a session that computes what the file says.

    Args:
        exact: Compute Q/DQ operator by operator, in float, instead of fusing it into integer kernels.
        threads: How many compute a call; as many as there are cores if None.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: its warnings are about graphs that it rewrites anyway
    # 4, the default, would round activations to INT8 inside an INT4 weight-only matmul
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if exact:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def provider_options(provider: str, model: Path, options: BuildOptions) -> dict[str, str]:
    """What a provider is told about a model, by its own names."""
    if provider not in TENSORRT:
        return {}
    # Engines are code, and the manifest vouches for all code in a bundle: they stay outside it.
    weights = model.with_name(f"{model.name}.data")
    files = [sha256_of(file) for file in (model, weights) if file.exists()]
    key = fingerprint_of([files, options.batch, options.workspace, options.level])
    cache = str(platformdirs.user_cache_path("dfq-deploy", ensure_exists=True) / f"ort-{key[:16]}")
    prefix = "nv" if provider == "rtx" else "trt"
    graph = onnx.load(model, load_external_data=False).graph
    (images,) = graph.input
    image = "x".join(str(size.dim_value) for size in images.type.tensor_type.shape.dim[1:])
    found = {
        f"{prefix}_profile_{end}_shapes": f"{images.name}:{size}x{image}"
        for end, size in zip(("min", "opt", "max"), options.batch, strict=True)
    }
    if options.workspace is not None:
        found[f"{prefix}_max_workspace_size"] = str(options.workspace)
    if provider == "rtx":
        return {**found, "nv_runtime_cache_path": cache}
    if options.level is not None:
        found["trt_builder_optimization_level"] = str(options.level)
    formats = {tensor.data_type for tensor in graph.initializer}
    for name, wanted in _FORMATS.items():  # TensorRT 10 asks to be told what Q/DQ and types say already
        found[f"trt_{name}_enable"] = str(int(wanted in formats))
    kept = {"trt_engine_cache_path": cache, "trt_timing_cache_path": cache}
    return {**found, **kept, "trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"}


def _not_here(provider: str, there: list[str]) -> NotHereError:
    package = "a build with TensorRT for RTX" if provider == "rtx" else "onnxruntime-gpu, with its libraries,"
    return NotHereError(
        what=f"ONNX Runtime does not run on `{provider}` here.",
        why=f"it has {', '.join(name for name, provider in PROVIDERS.items() if provider in there)}.",
        fix=f"install {package} in place of onnxruntime, or use --provider cpu.",
    )


def cannot_load(model: Path, cause: Exception) -> BackendError:
    """The error for a model that ONNX Runtime refuses."""
    return BackendError(
        what=f"ONNX Runtime {onnxruntime.__version__} cannot load `{model}`.",
        why=str(cause).strip().split("\n")[0],
        fix="export the model again with this version of ONNX Runtime, or try another --scheme.",
    )
