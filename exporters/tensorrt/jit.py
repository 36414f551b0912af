"""What only TensorRT for RTX does at run time: CUDA graphs of its own, and compiling kernels, which can be kept."""

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from calibrators.files import written_whole

__all__ = ["keep_kernels", "self_capturing"]


def self_capturing(trt: ModuleType, engine: Any, cache: Path | None) -> tuple[Any, Any]:
    """A runtime configuration with graphs of TensorRT's own, and its cache of kernels if there is a file for it.

    Both are None where TensorRT has no such thing.
    """
    if not hasattr(trt, "CudaGraphStrategy"):
        return None, None
    config, kernels = engine.create_runtime_config(), None
    config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    if cache is not None and hasattr(config, "create_runtime_cache"):
        kernels = config.create_runtime_cache()
        if cache.is_file():
            kernels.deserialize(cache.read_bytes())  # says False to kernels of another GPU or version, and starts empty
        config.set_runtime_cache(kernels)
    return config, kernels


def keep_kernels(data: bytes, cache: Path) -> None:
    """Write compiled kernels to the file `cache` if it does not hold them; warn where that is not possible."""
    try:
        if not cache.is_file() or cache.read_bytes() != data:
            with written_whole(cache) as temporary:
                temporary.write_bytes(data)
    except OSError as error:  # the next load compiles them again; no reason to fail after all has been answered
        warnings.warn(f"compiled kernels cannot be kept in `{cache}`: {error.strerror or error}.", stacklevel=2)
