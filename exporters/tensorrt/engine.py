"""A TensorRT engine on the GPU, the same for TensorRT 10, TensorRT 11 and TensorRT for RTX.

Buffers are taken once, for the largest batch, and a lock lets threads take turns. Images in main memory go through
pinned memory, copied by the GPU itself; images that lie on the GPU are read where they lie. Copies and kernels of one
batch size become a CUDA graph the second time that size is seen; TensorRT for RTX makes its graphs itself.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from calibrators.errors import BackendError
from exporters.tensorrt import cuda
from exporters.tensorrt.jit import keep_kernels, self_capturing
from exporters.tensorrt.loading import deserialize, rebuild
from exporters.tensorrt.log import recorder

__all__ = ["DeviceImages", "TensorRTEngine", "chunks"]

_MOST_GRAPHS = 8
_ALIGNMENT = 256  # bytes; what TensorRT asks of an address


class DeviceImages(Protocol):
    """Images on the GPU, as torch and CuPy have them."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...

    def __dlpack__(self, *, stream: int) -> object: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


def chunks(n: int, batch: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """How `n` images go through an engine for (smallest, usual, largest) batches: (start, stop, size) of each run."""
    smallest, _, largest = batch
    starts = range(0, n, largest)
    return [(start, min(start + largest, n), max(smallest, min(largest, n - start))) for start in starts]


@dataclass
class _Lane:
    """One batch size: a context that only it uses, since a graph goes stale when its context changes, and the graph."""

    context: Any
    graph: cuda.Graph | None = None
    tried: bool = False


class TensorRTEngine:
    """An engine file, loaded for the first GPU.

    Args:
        trt: The binding, `tensorrt` or `tensorrt_rtx`.
        path: The engine file, in the folder of its bundle.
        batch: Smallest, usual and largest batch that it was built for.
        cache: Where TensorRT for RTX keeps the kernels that it compiles, from one process to the next: read if it is
            there, and trusted as the engine is; `close` writes what is new. Without effect elsewhere.

    Raises:
        BackendError: There is no GPU, or the engine is not for it or not for this version of TensorRT.
    """

    def __init__(self, trt: ModuleType, path: Path, batch: tuple[int, int, int], *, cache: Path | None = None) -> None:
        cuda.require()
        self._trt, self._path, self._batch, self._cache = trt, path, batch, cache
        self._log, self._lock = recorder(trt), threading.Lock()
        self._lanes: OrderedDict[int, _Lane] = OrderedDict()
        with cuda.first_gpu():
            self._engine = deserialize(trt, path, self._log)
            self._image, self._output, self._numbers = self._shapes()
            self._host_images = cuda.HostBuffer((batch[2], *self._image))
            self._host_output = cuda.HostBuffer((batch[2], self._numbers))
            self._images = cuda.DeviceBuffer(self._host_images.array.nbytes)
            self._output_there = cuda.DeviceBuffer(self._host_output.array.nbytes)
            self._stream = cuda.Stream()
            self._config, self._kernels = self_capturing(trt, self._engine, cache)
            scratch = 0 if self._config is not None else self._engine.device_memory_size_v2
            self._scratch = cuda.DeviceBuffer(scratch)  # one for all contexts: they take turns
            self._free = self._context()  # of which no graph is captured
        self._owned = (
            self._host_images,
            self._host_output,
            self._images,
            self._output_there,
            self._scratch,
            self._stream,
        )

    @property
    def graphs(self) -> tuple[int, ...]:
        """Batch sizes that run as a CUDA graph of ours, the one used last at the end."""
        return tuple(size for size, lane in self._lanes.items() if lane.graph)

    def __call__(self, images: np.ndarray | DeviceImages) -> np.ndarray:
        """The output, flattened, (N, numbers) float32, in main memory, of images (N, C, H, W) float32.

        Images on the GPU are waited for on their own stream and read where they lie; they are copied, on the GPU, only
        where TensorRT cannot read them: at an address that is no multiple of 256, or fewer than the smallest batch.

        Raises:
            BackendError: The images have another shape or type, CUDA or TensorRT fails, or the engine is closed.
        """
        with self._lock:
            if self._engine is None:
                raise BackendError(what="the engine is closed.", why="close() was called.", fix="load it again.")
            self._log.clear()
            with cuda.first_gpu():
                run: Callable[[int, int, int], None]
                if isinstance(images, np.ndarray):
                    self._refuse_others(images.shape, images.dtype.str)
                    n, run = len(images), partial(self._run_host, images)
                else:
                    n, run = self._on_gpu(images)
                rows = np.empty((n, self._numbers), np.float32)
                for start, stop, size in chunks(n, self._batch):
                    run(start, stop, size)
                    self._stream.synchronize()
                    rows[start:stop] = self._host_output.array[: stop - start]
                return rows

    def close(self) -> None:
        """Free the engine and all its memory; twice does no harm."""
        with self._lock:
            if self._engine is None:
                return
            with cuda.first_gpu():
                try:
                    if self._cache is not None and self._kernels is not None:
                        keep_kernels(bytes(self._kernels.serialize()), self._cache)
                finally:
                    while self._lanes:
                        self._drop_oldest()
                    self._free = self._kernels = self._config = self._engine = None  # contexts before their engine
                    for owned in self._owned:
                        owned.close()

    def _shapes(self) -> tuple[tuple[int, ...], str, int]:
        """Shape (C, H, W) of an image, name and size of the output, once the engine is known to be one of ours."""
        names = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        outputs = names - {"images"}
        ours = len(names) == 2 and len(outputs) == 1
        if ours and all(self._engine.get_tensor_dtype(name) == self._trt.DataType.FLOAT for name in names):
            sizes = [tuple(shape) for shape in self._engine.get_tensor_profile_shape("images", 0)]
            if tuple(shape[0] for shape in sizes) == self._batch:
                (output,) = outputs
                return sizes[0][1:], output, prod(tuple(self._engine.get_tensor_shape(output))[1:])
        raise BackendError(
            what=f"`{self._path}` is not the engine that belongs here.",
            why=f"wanted is one from float32 `images` to one float32 output for batches of {self._batch}.",
            fix=rebuild(self._path),
        )

    def _context(self) -> Any:
        unowned = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(self._config or unowned)
        if context is None:
            raise self._failed(to="make an execution context")
        if self._config is None:
            context.set_device_memory(self._scratch.handle, self._engine.device_memory_size_v2)
        return context

    def _on_gpu(self, images: DeviceImages) -> tuple[int, Callable[[int, int, int], None]]:
        """How many images lie on the GPU, and what runs some of them; our stream waits until they are written."""
        facts = getattr(images, "__cuda_array_interface__", None)
        if facts is None or not hasattr(images, "__dlpack__") or images.__dlpack_device__()[1] != 0:
            raise BackendError(
                what="the images are neither in main memory nor on the GPU of the engine.",
                why=f"they are {type(images).__name__}, and the engine is on the first GPU.",
                fix="pass a numpy array, or a tensor on `cuda:0`.",
            )
        self._refuse_others(facts["shape"], facts["typestr"], contiguous=facts.get("strides") is None)
        images.__dlpack__(stream=self._stream.handle)  # only for the order; the address is in `facts`
        return facts["shape"][0], partial(self._run_device, facts["data"][0])

    def _refuse_others(self, shape: tuple[int, ...], dtype: str, *, contiguous: bool = True) -> None:
        if len(shape) != 4 or tuple(shape[1:]) != self._image or dtype != np.dtype(np.float32).str or not contiguous:
            raise BackendError(
                what=f"images of shape {tuple(shape)} and type {dtype} do not fit the engine.",
                why=f"it takes (N, {', '.join(map(str, self._image))}), <f4, contiguous if they are on the GPU.",
                fix="make them with Runner.preprocess, or convert them first.",
            )

    def _run_host(self, images: np.ndarray, start: int, stop: int, size: int) -> None:
        self._host_images.array[: stop - start] = images[start:stop]  # rows beyond keep what they had: they are cut off
        if self._config is not None:
            self._bind(self._free, size, self._images.handle)
            self._put(self._free, size, copy_in=True)
        elif size not in self._lanes:
            context = self._context()
            self._bind(context, size, self._images.handle)
            self._put(context, size, copy_in=True)  # before a capture: TensorRT sets itself up for the shape
            self._lanes[size] = _Lane(context)
            if len(self._lanes) > _MOST_GRAPHS:
                self._drop_oldest()
        else:
            self._run_lane(self._lanes[size], size)

    def _run_lane(self, lane: _Lane, size: int) -> None:
        self._lanes.move_to_end(size)
        work = partial(self._put, lane.context, size, copy_in=True)
        if not lane.tried:
            lane.tried = True
            capturable = getattr(lane.context, "is_stream_capturable", lambda _: True)
            lane.graph = self._stream.capture(work) if capturable(self._stream.handle) else None
        if lane.graph:
            lane.graph.launch(self._stream)
        else:
            work()

    def _run_device(self, address: int, start: int, stop: int, size: int) -> None:
        image = 4 * prod(self._image)
        address += start * image
        if address % _ALIGNMENT or stop - start < size:
            self._stream.copy(self._images.handle, address, (stop - start) * image)
            address = self._images.handle
        self._bind(self._free, size, address)
        self._put(self._free, size, copy_in=False)

    def _bind(self, context: Any, size: int, address: int) -> None:
        bound = context.set_input_shape("images", (size, *self._image))
        bound = bound and context.set_tensor_address("images", address)
        if not (bound and context.set_tensor_address(self._output, self._output_there.handle)):
            raise self._failed(to=f"be set up for a batch of {size}")

    def _put(self, context: Any, size: int, *, copy_in: bool) -> None:
        """Put one pass on the stream: images to the GPU if `copy_in`, the kernels, the output to main memory."""
        if copy_in:
            self._stream.copy(self._images.handle, self._host_images.handle, 4 * size * prod(self._image))
        if not context.execute_async_v3(self._stream.handle):
            raise self._failed(to="run")
        self._stream.copy(self._host_output.handle, self._output_there.handle, 4 * size * self._numbers)

    def _drop_oldest(self) -> None:
        _, lane = self._lanes.popitem(last=False)
        if lane.graph:
            lane.graph.close()

    def _failed(self, *, to: str) -> BackendError:
        reason = next(iter(self._log.errors()), "TensorRT gives no reason.")
        self._log.clear()
        return BackendError(what=f"`{self._path}` cannot {to}.", why=reason, fix=rebuild(self._path))
