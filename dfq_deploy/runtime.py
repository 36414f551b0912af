"""Production: a bundle in, logits out, with no torch and no timm.

`load` verifies the bundle and opens its engine. A `Runner` turns pictures into model input exactly as the model was
trained, and model input into logits. Any number of threads may call one runner at once.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeAlias

import numpy as np

from calibrators.decoding import MOST_PIXELS, Picture, pictures_in
from calibrators.errors import BackendError, BundleError, ImagesError
from calibrators.plan import QuantPlan
from calibrators.registry import pick
from calibrators.scheme import scheme_named
from exporters.backends import BuildOptions, Engine
from exporters.bundle import Manifest, open_bundle

__all__ = ["Runner", "load"]


class _Shared(Protocol):
    """A tensor of another library that NumPy reads where it lies, or TensorRT on the GPU."""

    def __dlpack__(self, *, stream: None = ...) -> Any: ...


_Images: TypeAlias = np.ndarray | _Shared


class Runner:
    """A bundle ready to answer.

    Attributes:
        manifest: What the bundle says of itself.
        classes: What each logit stands for, or None where the bundle does not say.
    """

    def __init__(self, manifest: Manifest, engine: Engine, classes: list[str] | None) -> None:
        self.manifest = manifest
        self.classes = classes
        self._engine: Engine | None = engine
        self._running = 0
        self._closed = False
        self._changed = threading.Condition()  # of the two above

    def preprocess(self, images: Picture | Sequence[Picture], *, most_pixels: int = MOST_PIXELS) -> np.ndarray:
        """Model input (N, C, H, W) float32 of one picture or several, as timm's loader and transform make it.

        Args:
            images: PIL images, paths, the bytes of files, or arrays (H, W, C) or (H, W) uint8, or a sequence of those,
                mixed or none; an array (N, H, W, C) is N.
            most_pixels: Width times height beyond which a picture is refused, before it is decoded.

        Raises:
            ImagesError: One is no whole picture or is too large; where there are several, the error has its number.
        """
        prepare, several = self.manifest.preprocess, pictures_in(images)
        ready = np.empty((len(several), *prepare.shape), np.float32)
        for number, picture in enumerate(several):
            unnamed = len(several) > 1 and not isinstance(picture, str | os.PathLike)
            name = f"images[{number}]" if unnamed else ""
            ready[number] = prepare(picture, name=name, most_pixels=most_pixels)
        return ready

    def __call__(self, images: _Images) -> np.ndarray:
        """Logits (N, classes) float32 of model input (N, C, H, W).

        A tensor of another library is read where it lies, by DLPack; TensorRT reads one on the GPU there. The logits
        can be had by DLPack, too (`torch.from_dlpack`).

        Raises:
            ImagesError: The images have another shape than the model's input, are no floats, or are not to be had.
            BackendError: The runner is closed, or the engine fails.
        """
        # a torch or CuPy tensor: TensorRT reads it where it lies, NumPy says that it cannot have it
        on_gpu = self.manifest.backend != "ort" and hasattr(images, "__cuda_array_interface__")
        ready: Any = images if on_gpu else _on_cpu(images)
        self._refuse_others(ready.shape)
        with self._in_use() as engine:
            return engine(ready) if len(ready) else self._nothing()

    def answer(self, requests: Sequence[_Images]) -> list[np.ndarray]:
        """The logits of each of several requests, in their order: (images, classes) for each, none for one of none.

        Requests share calls of the engine, none larger than its largest batch, and large ones are split. Where scales
        are found anew in every call (`w8a8_dynamic`), which company would change, each request has its own calls.

        Raises:
            ImagesError: As of a call, for any of them, before one is answered.
            BackendError: The runner is closed, or the engine fails.
        """
        ready = [_on_cpu(images) for images in requests]
        for images in ready:
            self._refuse_others(images.shape)
        groups = [[images] for images in ready] if scheme_named(self.manifest.scheme).dynamic else [ready]
        with self._in_use() as engine:
            logits = np.concatenate([self._nothing(), *chain.from_iterable(self._calls(engine, g) for g in groups)])
        ends = np.cumsum([len(images) for images in ready], dtype=np.int64)
        return np.split(logits, ends[:-1]) if ready else []

    def warm_up(self, *batches: int) -> None:
        """Run images of no content in batches of each size, twice: a first call sets up memory and kernels.

        Args:
            batches: The sizes that will be asked for; the engine's smallest and usual ones if none.

        Raises:
            BackendError: The runner is closed, or the engine fails.
        """
        smallest, usual, _ = self.manifest.engine.options.batch
        for size in batches or dict.fromkeys((smallest, usual)):
            images = np.zeros((size, *self.manifest.preprocess.shape), np.float32)
            for _ in range(2):
                self(images)

    def close(self) -> None:
        """Free the engine once the calls that run are finished; later ones are refused. Twice does no harm."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._running)
            if self._engine is not None:
                self._engine.close()
                self._engine = None

    def __enter__(self) -> "Runner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _in_use(self) -> Iterator[Engine]:
        """The engine, which is not freed as long as the block lasts."""
        with self._changed:
            if self._closed or self._engine is None:
                raise BackendError(
                    what="the runner is closed.", why="close() was called.", fix="load the bundle again."
                )
            self._running += 1
        try:
            yield self._engine
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _refuse_others(self, shape: Sequence[int]) -> None:
        if len(shape) != 4 or tuple(shape[1:]) != self.manifest.preprocess.shape:
            raise ImagesError(
                what=f"images of shape {tuple(shape)} do not fit the model.",
                why=f"it takes (N, {', '.join(map(str, self.manifest.preprocess.shape))}).",
                fix="make them with Runner.preprocess.",
            )

    def _calls(self, engine: Engine, requests: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Logits of all images of `requests`, in calls of at most the engine's largest batch."""
        images = chain.from_iterable(requests)
        while batch := list(islice(images, self.manifest.engine.options.batch[2])):
            yield engine(np.stack(batch))

    def _nothing(self) -> np.ndarray:
        return np.empty((0, self.manifest.model.classes), np.float32)


def _on_cpu(images: _Images) -> np.ndarray:
    """The images in main memory, contiguous float32; copied only if they are not."""
    try:
        shared = images if isinstance(images, np.ndarray) else np.from_dlpack(images)
    except Exception as cause:  # each library has its own
        raise ImagesError(
            what=f"images as {type(images).__name__} cannot be read.",
            why=str(cause) or type(cause).__name__,
            fix="pass what Runner.preprocess makes, or a tensor in main memory that needs no gradient.",
        ) from cause
    if shared.dtype.kind != "f":
        raise ImagesError(
            what=f"images of type {shared.dtype} are not model-ready.",
            why="the model takes floats that are scaled and normalised.",
            fix="make them with Runner.preprocess.",
        )
    return np.ascontiguousarray(shared, np.float32)


def _options_for(folder: Path, manifest: Manifest, provider: str) -> BuildOptions:
    """The options of a bundle for ONNX Runtime, with another provider that its model suits."""
    backend, made_with = pick("exporters.backends", manifest.backend), manifest.engine.options
    options = replace(made_with, provider=provider)
    if manifest.backend != "ort" or backend.placement(options) != backend.placement(made_with):
        raise BackendError(
            what=f"`{folder}` does not run on ONNX Runtime's `{provider}`.",
            why=f"it was made for {manifest.backend if manifest.backend != 'ort' else made_with.provider}.",
            fix=f"leave --provider out, or export with --backend ort --provider {provider}.",
        )
    backend.check(QuantPlan.load(folder / "plan.safetensors"), options)
    return options


def load(folder: str | Path, *, provider: str | None = None, threads: int | None = None) -> Runner:
    """The runner of the bundle in `folder`.

    Args:
        folder: A bundle with a built engine.
        provider: For ONNX Runtime, what runs it, if not what it was exported for: `cpu`, `cuda`, `tensorrt` or `rtx`.
        threads: For ONNX Runtime, how many it computes a call with; as many as there are cores if None.

    Raises:
        BundleError: The bundle is incomplete or altered, or its engine is pending.
        BackendError: Its run-time is not installed or cannot load it, or the engine was made for something else.
    """
    folder = Path(folder)
    manifest = open_bundle(folder)
    named = "classes.txt" in manifest.files
    classes = (folder / "classes.txt").read_text(encoding="utf-8").splitlines() if named else None
    facts, backend = manifest.engine, pick("exporters.backends", manifest.backend)
    options = facts.options
    if provider is not None:
        options = _options_for(folder, manifest, provider)
    if facts.state == "pending" and options == facts.options:
        raise BundleError(
            what=f"the engine of `{folder}` is not built yet.",
            why=facts.note,
            fix=f"run this on the machine that will run the engine: dfq-deploy build {folder}",
        )
    return Runner(manifest, backend.load(folder / "model.onnx", facts.made_for, options, threads=threads), classes)
