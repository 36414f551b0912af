"""Pictures from wherever they lie: a file, bytes, an array or a PIL image, decoded as timm's loader decodes them.

That is: the first frame of an animation, pixels as they are stored (an EXIF rotation is not applied), transparency
dropped, and what has more than 8 bits clipped at 255, since a model was trained and judged on pictures read that way.
Whoever wants a photograph upright turns it first (`PIL.ImageOps.exif_transpose`). Bytes come from strangers: whatever
they lead a decoder to becomes one error with the picture's name, and no picture is decoded that says it is larger than
a limit.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from calibrators.errors import ImagesError, LargeImageError

__all__ = ["MOST_PIXELS", "Picture", "decoded", "name_of", "pictures_in", "refuse_huge"]

MOST_PIXELS = 2**26  # 8192 x 8192: 256 MiB once decoded, and below what Pillow itself warns of
Picture: TypeAlias = Image.Image | str | os.PathLike[str] | bytes | np.ndarray


def decoded(
    picture: Picture,
    mode: str,
    *,
    name: str = "",
    most_pixels: int = MOST_PIXELS,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    """A PIL image of the mode `RGB` or `L`, in memory.

    Args:
        picture: A PIL image, a path, the bytes of a file, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) uint8.
        mode: What it is converted to.
        name: What an error calls it; if empty, its path, or what it is.
        most_pixels: Width times height beyond which it is refused, before it is decoded.
        formats: Of a file, by Pillow's names; None: all that Pillow reads.

    Raises:
        LargeImageError: It has more pixels.
        ImagesError: It is no picture, of another format, truncated or damaged.
    """
    name = name or name_of(picture)
    try:
        if isinstance(picture, np.ndarray):
            picture = _of_array(picture, name)
        if isinstance(picture, Image.Image):
            refuse_huge(*picture.size, name=name, most_pixels=most_pixels)
            return picture.convert(mode)
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else Path(picture), formats=formats) as image:
            refuse_huge(*image.size, name=name, most_pixels=most_pixels)
            return image.convert(mode)
    except ImagesError:
        raise
    except Image.DecompressionBombError as cause:  # Pillow's own limit, where ours is set higher
        raise _too_large(name, "its header says so", most_pixels) from cause
    except Exception as cause:  # broken bytes raise whatever they lead Pillow's decoders to
        if isinstance(cause, OSError) and cause.strerror:  # of the file system, not of a decoder
            raise ImagesError(
                what=f"{name} cannot be read.", why=f"{cause.strerror}.", fix="check the path."
            ) from cause
        raise ImagesError(
            what=f"{name} is not a whole image.",
            why=str(cause) or type(cause).__name__,
            fix="leave it out, or put a whole copy in its place.",
        ) from cause


def refuse_huge(width: int, height: int, *, name: str, most_pixels: int = MOST_PIXELS) -> None:
    """Return if a picture of that size may be held in memory.

    Raises:
        LargeImageError: It has more pixels than that.
    """
    if width * height > most_pixels:
        raise _too_large(name, f"it has {width} x {height} pixels", most_pixels)


def _too_large(name: str, why: str, most_pixels: int) -> LargeImageError:
    return LargeImageError(
        what=f"{name} is too large.",
        why=f"{why}, and {most_pixels} are the limit: a small file can name a size that no memory holds.",
        fix="make it smaller first; the model sees a few hundred pixels of it.",
    )


def pictures_in(pictures: Picture | Sequence[Picture]) -> list[Picture]:
    """One picture or several as a list; an array of four dimensions is as many as its first has."""
    if isinstance(pictures, np.ndarray):
        return list(pictures) if pictures.ndim == 4 else [pictures]
    if isinstance(pictures, Image.Image | str | os.PathLike | bytes):
        return [pictures]
    return list(pictures)


def name_of(picture: Picture) -> str:
    """What an error calls a picture: its path where it has one."""
    if isinstance(picture, str | os.PathLike):
        return f"`{os.fspath(picture)}`"
    path = getattr(picture, "filename", "")  # of a PIL image that was read from one
    return f"`{path}`" if path else "the image"


def _of_array(pixels: np.ndarray, name: str) -> Image.Image:
    fits = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))
    if pixels.dtype != np.uint8 or not fits or not pixels.size:
        raise ImagesError(
            what=f"{name} is not a picture: an array of shape {pixels.shape}, type {pixels.dtype}.",
            why="a picture is (H, W, C) uint8 from 0 to 255, with 1, 3 or 4 channels, or (H, W).",
            fix="convert it; what is model-ready goes into the runner as it is.",
        )
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
