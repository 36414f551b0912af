"""Pictures: model-ready pixels as people see them, and many of them on one sheet.

The way back from what `Preprocess` did, with the model's own mean and deviation. Nothing here is read again by a stage.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from calibrators.files import written_whole
from calibrators.images import ImageSet
from calibrators.preprocess import Preprocess

__all__ = ["contact_sheet", "picture", "pictures_on", "seen_beside", "sheet_beside", "write_contact_sheet"]

_MOST = 64  # images on a sheet
_GAP = 2  # pixels between two of them, white


def picture(pixels: np.ndarray, preprocess: Preprocess) -> Image.Image:
    """The 8-bit picture whose preprocessed form is `pixels` (C, H, W), as nearly as 8 bits allow.

    Of more than three channels it shows the first three, of two the first.
    """
    mean, std = (np.asarray(v, np.float64).reshape(-1, 1, 1) for v in (preprocess.mean, preprocess.std))
    levels = np.clip(np.rint((pixels * std + mean) * 255), 0, 255).astype(np.uint8)
    return Image.fromarray(levels[0] if len(levels) < len("RGB") else levels[:3].transpose(1, 2, 0))


def contact_sheet(images: ImageSet) -> Image.Image:
    """Up to 64 of the images, evenly spaced over the set, row by row in a grid about as wide as it is high."""
    shown = images.spread(_MOST)
    height, width = images.preprocess.size
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    size = (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP)
    sheet = Image.new("L" if images.preprocess.shape[0] < len("RGB") else "RGB", size, "white")
    for index in range(len(shown)):
        row, column = divmod(index, columns)
        place = (column * (width + _GAP), row * (height + _GAP))
        sheet.paste(picture(shown.pixels[index : index + 1][0], images.preprocess), place)
    return sheet


def pictures_on(sheet: Image.Image, count: int, size: tuple[int, int]) -> list[Image.Image]:
    """The `count` pictures on a contact sheet, each of that height and width; fewer where the sheet has not as many."""
    (height, width), columns = size, math.ceil(math.sqrt(count))
    found = []
    for index in range(count):
        row, column = divmod(index, columns)
        left, top = column * (width + _GAP), row * (height + _GAP)
        if left + width <= sheet.width and top + height <= sheet.height:
            found.append(sheet.crop((left, top, left + width, top + height)))
    return found


def sheet_beside(path: Path) -> Path:
    """Where the contact sheet of the ImageSet file `path` lies: beside it, under its name, as a PNG."""
    return path.with_name(f"{path.name.removesuffix('.safetensors')}.png")


def seen_beside(path: Path) -> tuple[Path, Path]:
    """Where pictures of what a model sees in the ImageSet file `path` lie: patch similarity, and attention."""
    stem = path.name.removesuffix(".safetensors")
    return path.with_name(f"{stem}.patch_similarity.png"), path.with_name(f"{stem}.attention.png")


def write_contact_sheet(images: ImageSet, path: Path) -> None:
    """Draw the contact sheet of `images`, whose file is `path`, beside it."""
    with written_whole(sheet_beside(path)) as temporary:
        contact_sheet(images).save(temporary, format="png")
