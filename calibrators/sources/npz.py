"""Images in a NumPy archive: `images` uint8, (N, H, W) grey or (N, H, W, 3) RGB, and optional `labels` (N,)."""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from calibrators.errors import ImagesError
from calibrators.files import fingerprint_of, sha256_of
from calibrators.images import ImageSet
from calibrators.preprocess import PreparedPixels, Preprocess

__all__ = ["open_images"]


def open_images(path: Path, preprocess: Preprocess) -> ImageSet:
    """The images in the archive `path`.

    Raises:
        ImagesError: The file is missing, damaged, or holds no `images` of that kind.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            images = archive["images"]
            labels = archive.get("labels")
        if images.dtype != np.uint8 or images.ndim < 3 or images.shape[3:] not in ((), (3,)) or not images.size:
            raise ValueError(images.dtype, images.shape)
        if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]):
            raise ValueError(labels.dtype, labels.shape, images.shape)
    except Exception as cause:  # bytes that are no archive raise whatever they lead NumPy to
        raise ImagesError(
            what=f"`{path}` is not an archive of images.",
            why=f"{type(cause).__name__}: {cause}.",
            fix="give it `images` as uint8 (N, H, W) or (N, H, W, 3), and `labels` (N,) where they exist.",
        ) from cause
    return ImageSet(
        pixels=PreparedPixels(images, preprocess),
        preprocess=preprocess,
        source=f"npz:{path.name}",
        fingerprint=fingerprint_of([asdict(preprocess), sha256_of(path)]),
        labels=None if labels is None else labels.astype(np.int64),
    )
