"""From an engine file to an engine, or to the reason why it cannot run on this machine.

An engine runs on the GPUs and with the version of TensorRT that it was built for. TensorRT tells what does not fit in
its log; TensorRT for RTX can be asked first.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from calibrators.errors import BackendError
from exporters.tensorrt.log import Recorder

__all__ = ["deserialize", "rebuild", "refuse_other"]

_UPDATE = "update the NVIDIA driver; `nvidia-smi` shows the newest CUDA that it runs."
_REASONS = {  # EngineInvalidityDiagnostics: what it means, and the remedy where it is not to build again
    "MALFORMED_ENGINE": ("it is not an engine, or is cut off.", None),
    "VERSION_MISMATCH": ("it was built with another version.", None),
    "UNSUPPORTED_CC": ("it was built for other GPUs than the one here.", None),
    "OLD_CUDA_DRIVER": ("the NVIDIA driver is too old for it.", _UPDATE),
    "OLD_CUDA_RUNTIME": ("CUDA here is older than the one that it was built with.", None),
    "INSUFFICIENT_GPU_MEMORY": ("the GPU has too little memory for it.", "build for a smaller largest --batch."),
    "CUDA_ERROR": ("CUDA failed while the GPU was looked at.", _UPDATE),
}
_OTHER_GPU = "across different models of devices"  # TensorRT's own warning, which it goes on after


def deserialize(trt: ModuleType, path: Path, log: Recorder) -> Any:
    """The `trt.ICudaEngine` in the file `path`.

    Raises:
        BackendError: There is no such file, or it was made for another GPU or version, or is broken.
    """
    try:
        data = path.read_bytes()
    except OSError as cause:
        reason = f"{cause.strerror or cause}."
        raise BackendError(what=f"`{path}` cannot be read.", why=reason, fix=rebuild(path)) from cause
    log.clear()
    try:
        runtime = trt.Runtime(log)
    except TypeError as cause:  # how the binding says that CUDA could not be started
        raise _refusal(trt, path, log.errors()) from cause
    asked = hasattr(runtime, "get_engine_validity")
    if asked:
        _ask_for_validity(trt, runtime, path, data, log)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise _refusal(trt, path, log.errors())
    if not asked and any(_OTHER_GPU in text for _, text in log.messages):
        raise _refusal(trt, path, ["it was built on another model of GPU."])
    return engine


def refuse_other(made_for: Mapping[str, str], here: Mapping[str, str], path: Path) -> None:
    """Return if the engine in the file `path`, which is `made_for` something, fits what is `here`.

    Raises:
        BackendError: It does not.
    """
    wrong = next((name for name, value in here.items() if made_for.get(name) != value), None)
    if wrong is not None:
        raise BackendError(
            what=f"`{path}` was made for {wrong} {made_for.get(wrong, 'of an unknown version')}.",
            why=f"here it is {here[wrong]}, and an engine runs only where it was made for.",
            fix=rebuild(path),
        )


def rebuild(path: Path) -> str:
    """The advice to build the engine in the file `path` again."""
    return f"build it again, here and with the TensorRT that is installed: dfq-deploy build {path.parent}"


def _ask_for_validity(trt: ModuleType, runtime: Any, path: Path, data: bytes, log: Recorder) -> None:
    validity, bits = runtime.get_engine_validity(data)
    if validity == trt.EngineValidity.INVALID:
        known = trt.EngineInvalidityDiagnostics.__members__
        found = [_REASONS[name] for name, bit in known.items() if name in _REASONS and bits & int(bit)]
        fix = next((fix for _, fix in found if fix), None)
        raise _refusal(trt, path, [why for why, _ in found] or log.errors(), fix)


def _refusal(trt: ModuleType, path: Path, reasons: Iterable[str], fix: str | None = None) -> BackendError:
    why = next(iter(reasons), "it gives no reason.")
    lacks_gpu = "cudaError" in why or "CUDA initialization" in why
    return BackendError(
        what=f"{trt.__name__} {trt.__version__} cannot load `{path}`.",
        why=why,
        fix=fix or (_UPDATE if lacks_gpu else rebuild(path)),
    )
