"""A model of three layers with its float ONNX form, and pixels that cannot be read: what tests of collectors share."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from calibrators.collectors import Subject
from calibrators.images import ImageSet
from calibrators.preprocess import Preprocess
from calibrators.sites import attach_sites
from exporters.to_onnx import export_float

__all__ = ["Failing", "small_subject"]


class _Small(nn.Module):
    """A convolution, and two layers that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.one = nn.Linear(4, 3)
        self.two = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.stem(x).relu().flatten(2).transpose(1, 2)
        return (self.one(features) + self.two(features)).mean(1)


def small_subject(folder: Path) -> tuple[Subject, ImageSet]:
    """The model, exported to `folder`, and 20 images for it."""
    torch.manual_seed(0)
    module = _Small().eval().requires_grad_(False)
    attach_sites(module)
    export_float(module, torch.zeros(2, 1, 16, 16), folder / "float.onnx")
    pixels = np.random.default_rng(0).laplace(size=(20, 1, 16, 16)).astype(np.float32)
    preprocess = Preprocess((16, 16), 1.0, "center", "bicubic", (0.5,), (0.5,))
    images = ImageSet.of(pixels, preprocess, source="test")
    return Subject(module, "m", folder / "float.onnx"), images


class Failing:
    """Pixels whose last slice can be read `reads` times, and then raises."""

    def __init__(self, pixels: np.ndarray, failure: BaseException, *, reads: int = 0) -> None:
        self._pixels, self._failure, self._left = pixels, failure, reads

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: slice) -> np.ndarray:
        if index.stop >= len(self):
            self._left -= 1
            if self._left < 0:
                raise self._failure
        return self._pixels[index]
