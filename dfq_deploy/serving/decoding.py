"""Image files as clients send them, made model input under a limit: JPEG and PNG, so many pixels and no more.

The header is read first: a file that would unfold into more pixels than allowed is refused before it does, and so is
one that is so narrow that it would when it is resized for the model.
"""

import io

import numpy as np
from PIL import Image

from calibrators.errors import ImagesError
from dfq_deploy.runtime import Runner
from dfq_deploy.serving.protocol import RequestError

__all__ = ["model_input"]

_FORMATS = ("JPEG", "PNG")


def model_input(files: list[bytes], runner: Runner, *, max_pixels: int) -> np.ndarray:
    """Model input (N, C, H, W) of the images in `files`.

    Raises:
        RequestError: One is no whole JPEG or PNG, or has more than `max_pixels` pixels, as it is or resized.
    """
    facts = runner.manifest.preprocess
    short = facts.size[0] / facts.crop_pct if facts.crop_mode == "center" else 0.0  # squashed ones get the same size
    images = [_decoded(data, which, max_pixels=max_pixels, short=short) for which, data in enumerate(files)]
    try:
        return runner.preprocess(images, most_pixels=max_pixels)
    except ImagesError as cause:
        raise RequestError(what=cause.what, why=cause.why, fix=cause.fix) from cause


def _decoded(data: bytes, which: int, *, max_pixels: int, short: float) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        width, height = image.size
        if width * height * max(1.0, short / min(width, height)) ** 2 > max_pixels:
            resized = "" if width * height > max_pixels else f", more when its shorter edge is resized to {short:.0f}"
            raise _too_large(which, f"it has {width} x {height} pixels{resized}, and {max_pixels} are allowed.")
        image.load()
    except RequestError:
        raise
    except Image.DecompressionBombError as cause:  # of Pillow's own limit, which is higher by default
        raise _too_large(which, f"{cause}") from cause
    except Exception as cause:  # Pillow's decoders raise what they like: OSError, SyntaxError, struct.error, …
        fix = f"send {' or '.join(_FORMATS)}."
        raise RequestError(what=f"image {which} cannot be decoded.", why=f"{cause}.", fix=fix) from cause
    return image


def _too_large(which: int, why: str) -> RequestError:
    return RequestError(413, what=f"image {which} is too large.", why=why, fix="make it smaller.")
