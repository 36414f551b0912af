"""CUDA, the little of it that an engine needs: buffers, copies, a stream and graphs, by NVIDIA's own bindings.

Whatever is taken is given back by `close()`, or else when its object is forgotten. One GPU is used, the first that
CUDA_VISIBLE_DEVICES shows. The package `cuda-bindings` is optional, and so is a driver: `device()` is None without.
"""

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibrators.errors import BackendError, NotHereError

try:
    from cuda.bindings import runtime
except ImportError:  # optional: `require` says so
    runtime = None

__all__ = ["Device", "DeviceBuffer", "Graph", "HostBuffer", "Stream", "check", "device", "first_gpu", "require"]

_FIX = "start again in a new process, and see what `dfq-deploy doctor` says."
_FIXES = {
    "cudaErrorInsufficientDriver": "update the NVIDIA driver; `nvidia-smi` shows the newest CUDA that it runs.",
    "cudaErrorNoDevice": "run this on a machine with an NVIDIA GPU that CUDA_VISIBLE_DEVICES does not hide.",
    "cudaErrorMemoryAllocation": "free memory of the GPU, or build for a smaller largest --batch.",
}


@dataclass(frozen=True)
class Device:
    """A GPU: its name, its compute capability as `sm89`, and its memory in bytes."""

    name: str
    capability: str
    memory: int


def device() -> Device | None:
    """The GPU that is used, or None where there is none that can be."""
    try:
        return require()
    except Exception:  # whatever the bindings raise on a machine that is not made for them
        return None


def require() -> Device:
    """The GPU that is used.

    Raises:
        NotHereError: There is none, or no driver, or no `cuda-bindings`.
    """
    what = "there is no NVIDIA GPU that can be used here."
    if runtime is None:
        raise NotHereError(what=what, why="`cuda-bindings` is not installed.", fix="pip install cuda-bindings.")
    try:
        driver = check(runtime.cudaDriverGetVersion())
        found = check(runtime.cudaGetDeviceProperties(0)) if driver else None
    except BackendError as error:
        raise NotHereError(what=what, why=f"{error.what} {error.why}", fix=error.fix) from error
    except RuntimeError:  # cuda-bindings 12 does not return this error
        found = None
    if found is None:
        fix = "run this on a machine with an NVIDIA GPU and its driver."
        raise NotHereError(what=what, why="no NVIDIA driver is installed.", fix=fix)
    return Device(found.name.decode(), f"sm{found.major}{found.minor}", int(found.totalGlobalMem))


def check(result: tuple[Any, ...]) -> Any:
    """What a CUDA call gave besides its error code: None, a value, or a tuple of values.

    Raises:
        BackendError: The code says that the call failed.
    """
    error, *values = result
    if int(error):
        name, text = (tell(error)[1].decode() for tell in (runtime.cudaGetErrorName, runtime.cudaGetErrorString))
        raise BackendError(what=f"CUDA failed with {name}.", why=f"{text}.", fix=_FIXES.get(name, _FIX))
    return tuple(values) if len(values) > 1 else values[0] if values else None


@contextmanager
def first_gpu() -> Iterator[None]:
    """CUDA calls of this thread go to the first GPU; afterwards to the one that they went to before."""
    before = check(runtime.cudaGetDevice())
    check(runtime.cudaSetDevice(0))
    try:
        yield
    finally:
        check(runtime.cudaSetDevice(before))


class _Owned(AbstractContextManager[Any]):
    """Something of CUDA's: `handle` is its address, or the number that CUDA knows it by."""

    def __init__(self, handle: Any, release: Callable[[int], object]) -> None:
        self.handle = int(handle)
        self._release = weakref.finalize(self, release, self.handle)

    def close(self) -> None:
        """Give it back; twice does no harm."""
        self._release()

    def __exit__(self, *_: object) -> None:
        self.close()


class DeviceBuffer(_Owned):
    """Bytes on the GPU, from `handle` on."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(check(runtime.cudaMalloc(max(1, nbytes))), runtime.cudaFree)


class HostBuffer(_Owned):
    """Pinned memory, which the GPU copies from and to by itself.

    Attributes:
        array: The memory as float32; not to be touched after `close`.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        count = int(np.prod(shape))
        super().__init__(check(runtime.cudaMallocHost(4 * count)), runtime.cudaFreeHost)
        self.array = np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.handle)).reshape(shape)


class Graph(_Owned):
    """Work that was captured from a stream, to be launched again and again as one piece."""

    def __init__(self, graph: Any) -> None:
        super().__init__(check(runtime.cudaGraphInstantiate(graph, 0)), runtime.cudaGraphExecDestroy)

    def launch(self, stream: "Stream") -> None:
        """Put all of it on a stream."""
        check(runtime.cudaGraphLaunch(self.handle, stream.handle))


class Stream(_Owned):
    """A queue of work; it waits for no other stream, and none waits for it."""

    def __init__(self) -> None:
        made = check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
        super().__init__(made, runtime.cudaStreamDestroy)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Put a copy on the stream; CUDA sees from the addresses which memory each is."""
        check(runtime.cudaMemcpyAsync(target, source, nbytes, runtime.cudaMemcpyKind.cudaMemcpyDefault, self.handle))

    def synchronize(self) -> None:
        """Wait until all that was put on the stream is done."""
        check(runtime.cudaStreamSynchronize(self.handle))

    def capture(self, work: Callable[[], None]) -> Graph | None:
        """What `work` puts on this stream, as a graph and not carried out; None where that cannot be captured."""
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal  # other threads may allocate meanwhile
        check(runtime.cudaStreamBeginCapture(self.handle, mode))
        try:
            work()
        except BackendError:
            whole = False
        else:
            whole = True
        finally:
            error, graph = runtime.cudaStreamEndCapture(self.handle)
        if int(error):
            runtime.cudaGetLastError()  # or the next call would report it
            return None
        try:
            return Graph(graph) if whole else None
        finally:
            runtime.cudaGraphDestroy(graph)
