"""Production: a bundle in, the model's outputs out, with no torch and no timm.

`load` verifies the bundle, a folder or a zip archive of one, and opens its engine. A `Runner` turns pictures into model
input exactly as the model was trained, and model input into what the model puts out. Any number of threads may call one
runner at once.
"""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
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
from exporters.archive import bundle_folder
from exporters.backends import BuildOptions, Engine
from exporters.bundle import Manifest, open_bundle
from exporters.outputs import parts_of

__all__ = ["Runner", "load", "refuse_others"]


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
        """What the model puts out, (N, …) float32, of model input (N, C, H, W): logits (N, classes) of a classifier.

        A tensor of another library is read where it lies, by DLPack; TensorRT reads one on the GPU there. The output
        can be had by DLPack, too (`torch.from_dlpack`).

        Raises:
            ImagesError: The images have another shape than the model's input, are no floats, or are not to be had.
            BackendError: The runner is closed, the engine fails, or the model has several outputs.
        """
        found = self.outputs(images)
        if len(found) > 1:
            raise BackendError(
                what=f"`{self.manifest.model.name}` has several outputs: {', '.join(found)}.",
                why="a call gives one array.",
                fix="call runner.outputs(images), which gives all of them by name.",
            )
        return next(iter(found.values()))

    def outputs(self, images: _Images) -> dict[str, np.ndarray]:
        """All that the model puts out, by name, each (N, …) float32; see a call of the runner.

        Raises:
            ImagesError: The images have another shape than the model's input, are no floats, or are not to be had.
            BackendError: The runner is closed, or the engine fails.
        """
        # a torch or CuPy tensor: TensorRT reads it where it lies, NumPy says that it cannot have it
        on_gpu = self.manifest.backend != "ort" and hasattr(images, "__cuda_array_interface__")
        ready: Any = images if on_gpu else _on_cpu(images)
        self._refuse_others(ready.shape)
        with self._in_use() as engine:
            rows = engine(ready) if len(ready) else self._nothing()
        return parts_of(rows, self.manifest.model.outputs)

    def answer(self, requests: Sequence[_Images]) -> list[np.ndarray]:
        """What comes out for each of several requests, outputs side by side, in their order: (images, numbers).

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
            rows = np.concatenate([self._nothing(), *chain.from_iterable(self._calls(engine, g) for g in groups)])
        ends = np.cumsum([len(images) for images in ready], dtype=np.int64)
        return np.split(rows, ends[:-1]) if ready else []

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
                self.outputs(images)

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

    @contextlib.contextmanager
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
        """What comes out for all images of `requests`, in calls of at most the engine's largest batch."""
        images = chain.from_iterable(requests)
        while batch := list(islice(images, self.manifest.engine.options.batch[2])):
            yield engine(np.stack(batch))

    def _nothing(self) -> np.ndarray:
        return np.empty((0, sum(output.size for output in self.manifest.model.outputs)), np.float32)


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


def load(
    path: str | Path, *, provider: str | None = None, threads: int | None = None, verify: str | Path | None = None
) -> Runner:
    """The runner of a bundle.

    Args:
        path: The folder of a bundle with a built engine, or a zip archive of one, which is unpacked into a temporary
            folder until the runner is closed.
        provider: For ONNX Runtime, what runs it, if not what it was exported for: `cpu`, `cuda`, `tensorrt` or `rtx`.
        threads: For ONNX Runtime, how many it computes a call with; as many as there are cores if None.
        verify: PEM file with the public key that the bundle must be signed with.

    Raises:
        BundleError: The bundle is incomplete or altered, not signed with that key, or its engine is pending.
        BackendError: Its run-time is not installed or cannot load it, or the engine was made for something else.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(bundle_folder(Path(path)))
        manifest = open_bundle(folder, verify=verify)
        classes = _classes(folder, manifest)
        engine = _engine(folder, manifest, provider, threads)
        stack.callback(engine.close)
        return Runner(manifest, _Kept(engine, stack.pop_all()), classes)


def refuse_others(manifest: Manifest, doing: str, why: str) -> None:
    """Return if the bundle's model is a classifier, which is all that `doing` has an answer for, since `why`.

    Raises:
        BackendError: It is not.
    """
    if manifest.model.task != "classification":
        raise BackendError(
            what=f"{doing} is for classifiers, and `{manifest.model.name}` is for {manifest.model.task}.",
            why=f"{why}.",
            fix="run it from Python, with dfq_deploy.load(FOLDER).outputs(images), or `dfq-deploy serve-repo`.",
        )


def _classes(folder: Path, manifest: Manifest) -> list[str] | None:
    """What each logit stands for, where the bundle says so."""
    if "classes.txt" not in manifest.files:
        return None
    try:
        names = (folder / "classes.txt").read_text(encoding="utf-8").splitlines()
        if len(names) != manifest.model.classes or not all(name.isprintable() for name in names):
            message = f"it has {len(names)} names for {manifest.model.classes} classes, or one that is no text"
            raise ValueError(message)
    except ValueError as cause:
        raise BundleError(
            what=f"`{folder / 'classes.txt'}` does not name the classes.",
            why=f"{cause}.",
            fix="export the model again.",
        ) from cause
    return names


def _engine(folder: Path, manifest: Manifest, provider: str | None, threads: int | None) -> Engine:
    facts, backend = manifest.engine, pick("exporters.backends", manifest.backend)
    options = facts.options if provider is None else _options_for(folder, manifest, provider)
    if facts.state == "pending" and options == facts.options:
        raise BundleError(
            what=f"the engine of `{folder}` is not built yet.",
            why=facts.note,
            fix=f"run this on the machine that will run the engine: dfq-deploy build {folder}",
        )
    engine: Engine = backend.load(folder / "model.onnx", facts.made_for, options, threads=threads)
    return engine


class _Kept:
    """An engine with what must stay until it is closed, such as the folder that it was unpacked into."""

    def __init__(self, engine: Engine, kept: contextlib.ExitStack) -> None:
        self._engine, self._kept = engine, kept

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self._engine(images)

    def close(self) -> None:
        self._kept.close()
