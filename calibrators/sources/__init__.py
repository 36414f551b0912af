"""Real images: one file per kind of place they lie in. `NAME:PATH` on the command line picks `NAME.py`."""

from pathlib import Path
from typing import Protocol

from calibrators.images import ImageSet
from calibrators.preprocess import Preprocess

__all__ = ["Source"]


class Source(Protocol):
    """What each module in this folder offers."""

    def open_images(self, path: Path, preprocess: Preprocess) -> ImageSet:
        """The images at `path`, model-ready, in an order that depends on their names alone."""
        ...
