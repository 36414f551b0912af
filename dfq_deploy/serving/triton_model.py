"""Image files to model input, as a model of Triton's Python backend; `dfq-deploy serve-repo` copies this file.

It runs in Triton's own Python, which has NumPy and needs Pillow, and where dfq-deploy is not installed: so it holds
preprocessing a second time, and a test holds it against the first. The numbers come from `config.pbtxt`.
"""

import io
import json
import math
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from PIL import Image

__all__ = ["TritonPythonModel"]

_FORMATS = ("JPEG", "PNG")


class TritonPythonModel:
    """Answers `encoded`, BYTES (N, 1), with `images`, FP32 (N, C, H, W); one broken file refuses its request alone."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the numbers; Triton calls this once, with its configuration as JSON."""
        parameters = json.loads(args["model_config"])["parameters"]
        self._facts: dict[str, Any] = json.loads(parameters["preprocess"]["string_value"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request, in order."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        files = pb_utils.get_input_tensor_by_name(request, "encoded").as_numpy().ravel()
        try:
            images = np.stack([self._input(self._decoded(data, which)) for which, data in enumerate(files)])
        except ValueError as error:
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("images", images)])

    def _decoded(self, data: bytes, which: int) -> Image.Image:
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            resized = self._resized(*image.size)  # a narrow image grows
            small = max(math.prod(image.size), math.prod(resized)) <= self._facts["max_pixels"]
            if small:
                image.load()
        except Exception as cause:  # Pillow's decoders raise what they like
            message = f"image {which} cannot be decoded: {cause}; send {' or '.join(_FORMATS)}"
            raise ValueError(message) from cause
        if not small:
            size, most = f"{image.width} x {image.height} pixels", self._facts["max_pixels"]
            message = f"image {which} has {size}, more than {most} as it is or resized"
            raise ValueError(message)
        return image

    def _input(self, image: Image.Image) -> np.ndarray:
        facts, (height, width) = self._facts, self._facts["size"]
        image = image.convert("RGB" if len(facts["mean"]) == 3 else "L")
        image = image.resize(self._resized(*image.size), Image.Resampling[facts["interpolation"].upper()])
        fill = tuple(round(255 * mean) for mean in facts["mean"])
        canvas = Image.new(image.mode, (width, height), fill if len(fill) > 1 else fill[0])
        canvas.paste(image, (_offset(width, image.width), _offset(height, image.height)))
        pixels = np.atleast_3d(np.asarray(canvas, np.float32) / np.float32(255)).transpose(2, 0, 1)
        mean, std = (np.asarray(facts[name], np.float32).reshape(-1, 1, 1) for name in ("mean", "std"))
        return np.ascontiguousarray((pixels - mean) / std)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        mode, crop_pct = self._facts["crop_mode"], self._facts["crop_pct"]
        target_h, target_w = (math.floor(edge / crop_pct) for edge in self._facts["size"])
        if mode == "squash":
            return target_w, target_h
        if mode == "border" or target_h != target_w:  # one edge meets the target, the other follows
            ratio = (max if mode == "border" else min)(height / target_h, width / target_w)
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        if width <= height:
            return target_w, int(target_w * height / width)
        return int(target_h * width / height), target_h


def _offset(canvas: int, image: int) -> int:
    """Where an image begins on a canvas in whose middle it lies."""
    return (canvas - image) // 2 if canvas > image else -round((image - canvas) / 2)
