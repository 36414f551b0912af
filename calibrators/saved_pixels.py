"""The tensors of an ImageSet file, read when they are asked for, so that memory does not grow with their number."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from calibrators.errors import ImagesError

__all__ = ["STUDENT", "SavedPixels"]

STUDENT = "student."
"""What the names of a student's tensors begin with."""


class SavedPixels:
    """Pixels read slice by slice from an ImageSet file.

    The file is opened for each slice: while it is open, what was read of it counts as this process's memory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, "numpy") as file:
                self.metadata: dict[str, str] = file.metadata() or {}
                pixels = file.get_slice("pixels")
                if len(pixels.get_shape()) != 4 or pixels.get_dtype() != "F32":
                    raise _not_images("pixels", pixels)
                self._count = int(pixels.get_shape()[0])
                self.labels = file.get_tensor("labels") if "labels" in list(file.keys()) else None
                if self.labels is not None and (self.labels.shape != (self._count,) or self.labels.dtype != np.int64):
                    raise _not_images("labels", file.get_slice("labels"))
        except (OSError, SafetensorError, ValueError) as cause:
            raise ImagesError(
                what=f"`{path}` cannot be read as an ImageSet.",
                why=str(cause),
                fix="pass a file made by `dfq-deploy generate`, or `folder:PATH` for a folder of images.",
            ) from cause

    def __len__(self) -> int:
        return self._count

    def student(self) -> dict[str, np.ndarray]:
        """The student's weights by name."""
        with safe_open(self._path, "numpy") as file:
            names = [name for name in file.keys() if name.startswith(STUDENT)]  # noqa: SIM118
            return {name.removeprefix(STUDENT): file.get_tensor(name) for name in names}

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, _ = index.indices(self._count)  # safetensors, unlike NumPy, refuses a slice past the end
        with safe_open(self._path, "numpy") as file:
            return np.asarray(file.get_slice("pixels")[start:stop])


def _not_images(name: str, tensor: Any) -> ValueError:
    return ValueError(f"its {name} are {tensor.get_dtype()} of shape {tuple(tensor.get_shape())}")
