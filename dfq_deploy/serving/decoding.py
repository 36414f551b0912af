"""Image files as clients send them, made model input under a limit: JPEG and PNG, so many pixels and no more.

The header is read first: a file that would unfold into more pixels than allowed is refused before it does, and so is
one that is so narrow that it would when it is resized for the model.
"""

import numpy as np

from calibrators.errors import ImagesError, LargeImageError
from calibrators.preprocess import Preprocess
from dfq_deploy.serving.protocol import RequestError

__all__ = ["model_input"]

_FORMATS = ("JPEG", "PNG")


def model_input(files: list[bytes], prepare: Preprocess, *, max_pixels: int) -> np.ndarray:
    """Model input (N, C, H, W) of the images in `files`.

    Raises:
        RequestError: One is no whole JPEG or PNG, or has more than `max_pixels` pixels, as it is or resized.
    """
    images = np.empty((len(files), *prepare.shape), np.float32)
    for which, data in enumerate(files):
        try:
            images[which] = prepare(data, name=f"image {which}", most_pixels=max_pixels, formats=_FORMATS)
        except LargeImageError as cause:
            raise RequestError(413, what=cause.what, why=cause.why, fix="make it smaller.") from cause
        except ImagesError as cause:
            fix = f"send {' or '.join(_FORMATS)}."
            raise RequestError(what=f"image {which} cannot be decoded.", why=cause.why, fix=fix) from cause
    return images
