"""Production: a bundle in, logits out, with no torch and no timm.

`load` verifies the bundle and opens its engine. A `Runner` turns images into model input exactly as the model was
trained, and model input into logits.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image

from calibrators.errors import BackendError, BundleError, ImagesError
from calibrators.plan import QuantPlan
from calibrators.registry import pick
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


def load(folder: str | Path, *, provider: str | None = None) -> Runner:
    """The runner of the bundle in `folder`.

    Args:
        folder: A bundle with a built engine.
        provider: For ONNX Runtime, what runs it, if not what it was exported for: `cpu`, `cuda`, `tensorrt` or `rtx`.

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
    return Runner(manifest, backend.load(folder / "model.onnx", facts.made_for, options), classes)
