"""Image files as clients send them, decoded under a limit: JPEG and PNG, so many pixels and no more.

The header is read first; a file that would unfold into more pixels than allowed is refused before it does.
"""

import io

from PIL import Image

from dfq_deploy.serving.protocol import RequestError

__all__ = ["decode"]

_FORMATS = ("JPEG", "PNG")


def decode(data: bytes, which: int, max_pixels: int) -> Image.Image:
    """The image in `data`, the `which`th of its request.

    Raises:
        RequestError: It is no whole JPEG or PNG, or has more than `max_pixels` pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height <= max_pixels:
            image.load()
            return image
        why = f"it has {image.width} x {image.height} pixels, and {max_pixels} are allowed."
    except Exception as cause:  # Pillow's decoders raise what they like: OSError, SyntaxError, struct.error, …
        fix = f"send {' or '.join(_FORMATS)}."
        raise RequestError(what=f"image {which} cannot be decoded.", why=f"{cause}.", fix=fix) from cause
    raise RequestError(413, what=f"image {which} is too large.", why=why, fix="make it smaller.")
