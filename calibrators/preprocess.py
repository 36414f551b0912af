"""How a picture becomes the array that a model was trained on.

The facts come from the model and travel with every artefact. No torch here: production uses this file too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from PIL import Image

from calibrators.decoding import MOST_PIXELS, Picture, decoded, name_of, refuse_huge
from calibrators.errors import ImagesError

__all__ = ["CropMode", "PreparedPixels", "Preprocess"]

CropMode: TypeAlias = Literal["center", "squash", "border"]
"""How a picture of another shape becomes the image, see `Preprocess`."""

_LARGEST = 2**14  # pixels of an edge, before the crop
_MODES = {1: "L", 3: "RGB"}  # of pictures, by channels


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes a model's input.

    Attributes:
        size: Height and width of the input, in pixels.
        crop_pct: Share of the resized image's edge that the centre crop keeps.
        crop_mode: `center` keeps the aspect ratio and loses the rims; `squash` keeps all and distorts; `border` keeps
            both, and fills what is left with the mean.
        interpolation: A PIL resampling name, such as `bicubic`.
        mean: Per-channel mean, subtracted after scaling pixels to 0..1.
        std: Per-channel standard deviation, divided by after that.
    """

    size: tuple[int, int]
    crop_pct: float
    crop_mode: CropMode
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.crop_mode not in get_args(CropMode):
            raise ImagesError(
                what=f"preprocessing with crop mode `{self.crop_mode}` is not supported.",
                why="only `center`, `squash` and `border` are built.",
                fix="use a variant of the model with one of those.",
            )
        edges = [edge / self.crop_pct for edge in self.size] if 0 < self.crop_pct < math.inf else [0]
        sound = len(self.mean) == len(self.std) >= 1 and self.interpolation.upper() in Image.Resampling.__members__
        sound &= all(1 <= edge <= _LARGEST for edge in (*self.size, *edges)) and all(self.std)
        if not sound or not np.isfinite([*self.mean, *self.std]).all():
            why = f"{self} has a size, a resampling, a mean or a deviation that is none."
            raise ImagesError(what="no image can be preprocessed so.", why=why, fix="use the numbers of the model.")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one input: channels, height, width."""
        return (len(self.mean), *self.size)

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Values of a black and of a white pixel, each (C, 1, 1) float32: the range of any real image."""
        mean, std = (np.asarray(v, np.float32).reshape(-1, 1, 1) for v in (self.mean, self.std))
        return -mean / std, (1 - mean) / std

    def __call__(
        self,
        picture: Picture,
        *,
        name: str = "",
        most_pixels: int = MOST_PIXELS,
        formats: tuple[str, ...] | None = None,
    ) -> np.ndarray:
        """A model-ready (C, H, W) float32 array, as timm's evaluation transform makes it.

        Args:
            picture: A PIL image, a path, the bytes of a file, or an array (H, W, C) or (H, W) uint8.
            name: What an error calls it; if empty, its path, or what it is.
            most_pixels: Beyond so many it is refused, as it is and resized: one row of pixels can grow to gigabytes.
            formats: Of a file, by Pillow's names; None: all that Pillow reads.

        Raises:
            LargeImageError: It has more pixels.
            ImagesError: It is no picture, of another format, truncated or damaged.
        """
        name = name or name_of(picture)
        mode = _MODES.get(len(self.mean))
        if mode is None:
            raise ImagesError(
                what=f"{name} cannot become the model's input.",
                why=f"pictures have 1 or 3 channels, the model takes {len(self.mean)}.",
                fix="pass a file of model-ready images: one of `dfq-deploy generate`, or that `ImageSet.save` wrote.",
            )
        image = decoded(picture, mode, name=name, most_pixels=most_pixels, formats=formats)
        width, height = self._resized(*image.size)
        refuse_huge(width, height, name=f"{name}, resized for the model,", most_pixels=most_pixels)
        image = image.resize((width, height), Image.Resampling[self.interpolation.upper()])
        pixels = np.asarray(self._centred(image), np.float32) / np.float32(255)
        pixels = np.atleast_3d(pixels).transpose(2, 0, 1)
        mean, std = (np.asarray(v, np.float32).reshape(-1, 1, 1) for v in (self.mean, self.std))
        return np.ascontiguousarray((pixels - mean) / std)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        target_h, target_w = (math.floor(edge / self.crop_pct) for edge in self.size)
        if self.crop_mode == "squash":
            return target_w, target_h
        if self.crop_mode == "border" or target_h != target_w:  # one edge meets the target, the other follows
            ratio = (max if self.crop_mode == "border" else min)(height / target_h, width / target_w)
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        if width <= height:
            return target_w, int(target_w * height / width)
        return int(target_h * width / height), target_h

    def _centred(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        fill = tuple(round(255 * mean) for mean in self.mean)
        canvas = Image.new(image.mode, (width, height), fill if len(fill) > 1 else fill[0])
        canvas.paste(image, (_offset(width, image.width), _offset(height, image.height)))
        return canvas


def _offset(canvas: int, image: int) -> int:
    """Where an image begins on a canvas in whose middle it lies."""
    return (canvas - image) // 2 if canvas > image else -round((image - canvas) / 2)


class PreparedPixels:
    """Pictures that are made model-ready when a slice of them is read.

    Args:
        pictures: Files, or arrays.
        preprocess: What makes them so.
    """

    def __init__(self, pictures: Sequence[Picture] | np.ndarray, preprocess: Preprocess) -> None:
        self._pictures = pictures
        self._preprocess = preprocess

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: slice) -> np.ndarray:
        return np.stack([self._preprocess(picture) for picture in self._pictures[index]])
