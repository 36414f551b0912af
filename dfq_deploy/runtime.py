"""Production: a bundle in, logits out, with no torch and no timm.

`load` verifies the bundle, a folder or a zip archive of one, and opens its engine. A `Runner` turns images into model
input exactly as the model was trained, and model input into logits.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image

from calibrators.errors import BackendError, BundleError, ImagesError
from calibrators.plan import QuantPlan
from calibrators.registry import pick
from exporters.archive import bundle_folder
from exporters.backends import BuildOptions, Engine
from exporters.bundle import Manifest, open_bundle

__all__ = ["Runner", "load"]


class Runner:
    """A bundle ready to answer.

    Attributes:
        manifest: What the bundle says of itself.
        classes: What each logit stands for, or None where the bundle does not say.
    """

    def __init__(self, manifest: Manifest, engine: Engine, classes: list[str] | None) -> None:
        self.manifest = manifest
        self.classes = classes
        self._engine = engine

    def preprocess(self, images: Image.Image | Sequence[Image.Image]) -> np.ndarray:
        """Model input (N, C, H, W) float32 of one PIL image or several."""
        several = [images] if isinstance(images, Image.Image) else images
        return np.stack([self.manifest.preprocess(image) for image in several])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits (N, classes) float32 of model input (N, C, H, W); TensorRT reads images on the GPU where they lie.

        Raises:
            ImagesError: The array has another shape than the model's input.
        """
        if images.ndim != 4 or images.shape[1:] != self.manifest.preprocess.shape:
            raise ImagesError(
                what=f"images of shape {images.shape} do not fit the model.",
                why=f"it takes (N, {', '.join(map(str, self.manifest.preprocess.shape))}).",
                fix="make them with Runner.preprocess.",
            )
        # a torch or CuPy tensor: TensorRT reads it where it lies, NumPy says that it cannot have it
        on_gpu = self.manifest.backend != "ort" and hasattr(images, "__cuda_array_interface__")
        return self._engine(images if on_gpu else np.ascontiguousarray(images, np.float32))

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()

    def __enter__(self) -> "Runner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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


def load(path: str | Path, *, provider: str | None = None, verify: str | Path | None = None) -> Runner:
    """The runner of a bundle.

    Args:
        path: The folder of a bundle with a built engine, or a zip archive of one, which is unpacked into a temporary
            folder until the runner is closed.
        provider: For ONNX Runtime, what runs it, if not what it was exported for: `cpu`, `cuda`, `tensorrt` or `rtx`.
        verify: PEM file with the public key that the bundle must be signed with.

    Raises:
        BundleError: The bundle is incomplete or altered, not signed with that key, or its engine is pending.
        BackendError: Its run-time is not installed or cannot load it, or the engine was made for something else.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(bundle_folder(Path(path)))
        manifest = open_bundle(folder, verify=verify)
        classes = _classes(folder, manifest)
        engine = _engine(folder, manifest, provider)
        stack.callback(engine.close)
        return Runner(manifest, _Kept(engine, stack.pop_all()), classes)


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


def _engine(folder: Path, manifest: Manifest, provider: str | None) -> Engine:
    facts, backend = manifest.engine, pick("exporters.backends", manifest.backend)
    options = facts.options if provider is None else _options_for(folder, manifest, provider)
    if facts.state == "pending" and options == facts.options:
        raise BundleError(
            what=f"the engine of `{folder}` is not built yet.",
            why=facts.note,
            fix=f"run this on the machine that will run the engine: dfq-deploy build {folder}",
        )
    engine: Engine = backend.load(folder / "model.onnx", facts.made_for, options)
    return engine


class _Kept:
    """An engine with what must stay until it is closed, such as the folder that it was unpacked into."""

    def __init__(self, engine: Engine, kept: contextlib.ExitStack) -> None:
        self._engine, self._kept = engine, kept

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self._engine(images)

    def close(self) -> None:
        self._kept.close()
