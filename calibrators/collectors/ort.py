"""Ranges from ONNX Runtime's own calibrators on the float ONNX model, to compare ours with.

What ONNX Runtime 1.31 does, and what is done about it here: its percentile and entropy calibrators hold every tensor
of every image, some 100 MB an image for ViT-S, when they get all images at once; here they get a batch at a time,
which they merge, and watch the sites' tensors only. All of them pass over NaN; the torch model sees the images first
and refuses it. Entropy with its default of 128 bins is MinMax; here it has 4096 bins and 255 levels, which keeps
TensorRT's 16 bins per level and takes one to two seconds a tensor.
"""

import contextlib
import dataclasses
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import calibrate

from calibrators.affine import Codes
from calibrators.collectors import Subject, check_observer, described
from calibrators.errors import PlanError
from calibrators.images import ImageSet
from calibrators.interchange import ImageSetReader
from calibrators.observing import observed_for
from calibrators.ranges import Ranges

__all__ = ["NEEDS_ONNX", "OBSERVERS", "check", "collect_ranges"]

_CALIBRATORS = {
    "minmax": calibrate.MinMaxCalibrater,
    "percentile": calibrate.PercentileCalibrater,
    "entropy": calibrate.EntropyCalibrater,
}
OBSERVERS = tuple(_CALIBRATORS)
NEEDS_ONNX = True
_ENTROPY = {"num_bins": 4096, "num_quantized_bins": 255}
_BATCH = 8


def check(observer: str, codes: Codes | None) -> None:  # noqa: ARG001, its observers know no formats
    """Nothing, if `observer` is one of `OBSERVERS`.

    Raises:
        RecipeError: It is none.
    """
    check_observer("ort", observer, OBSERVERS)


def collect_ranges(
    subject: Subject,
    images: ImageSet,
    *,
    observer: str,
    percentile: float,
    codes: Codes | None,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> Ranges:
    """Ranges of every site that `images` reach, in float32; those of activations are ONNX Runtime's.

    `percentile` means what it means to our observer, the share of values below the upper end. ONNX Runtime counts what
    it cuts off at both ends together, so it is given 2 `percentile` - 100.

    Raises:
        PlanError: NaN or Inf passed a site, or the ONNX model is another one.
    """
    check(observer, codes)
    assert subject.onnx is not None
    n = len(images)
    seen, tensors = observed_for(subject, images, progress)
    options: dict[str, Any] = {"entropy": _ENTROPY, "percentile": {"percentile": 2 * percentile - 100}}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # it prints
        calibrator = _watching(_CALIBRATORS[observer], set(tensors.values()))(
            subject.onnx,
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            use_external_data_format=True,
            **options.get(observer, {}),
        )
        calibrator.augment_graph()
        calibrator.create_inference_session()
        reader = ImageSetReader(images, batch_size=_BATCH)
        for index in range(len(reader)):
            reader.set_range(index, index + 1)
            calibrator.collect_data(reader)
            progress(n + min((index + 1) * _BATCH, n), 2 * n)
        found = calibrator.compute_data()
    lost = sorted(set(tensors.values()) - set(found.keys()))
    if lost:
        raise PlanError(
            what=f"ONNX Runtime's calibrator did not look at `{lost[0]}`, nor at {len(lost) - 1} more tensors.",
            why="it knows the type of those tensors only that ONNX's shape inference reaches.",
            fix="use --collector pytorch.",
        )
    for site, tensor in tensors.items():
        low, high = (np.asarray(end, np.float32).reshape(()) for end in found[tensor].range_value)
        seen[site] = dataclasses.replace(seen[site], low=low, high=high)
    used = f"ONNX Runtime's {described(observer, percentile, None)}"
    return Ranges(seen, subject.fingerprint, images.fingerprint, used)


def _watching(calibrator: Any, tensors: set[str]) -> Any:
    """The calibrator class `calibrator`, looking at `tensors` only."""

    class Watching(calibrator):  # type: ignore[misc]
        def select_tensors_to_calibrate(self, model: Any) -> tuple[set[str], dict[str, Any]]:
            found, described_as = super().select_tensors_to_calibrate(model)
            return found & tensors, described_as

    return Watching
