"""The tensors of an ImageSet file, read when they are asked for, so that memory does not grow with their number."""

from pathlib import Path

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
                shape, kind = pixels.get_shape(), pixels.get_dtype()
                self._count = int(shape[0]) if shape else 0
                self.labels = file.get_tensor("labels") if "labels" in list(file.keys()) else None
            labelled = self.labels is None or (self.labels.shape == (self._count,) and self.labels.dtype == np.int64)
            if len(shape) != 4 or kind != "F32" or not labelled:
                message = f"its pixels are {kind} of shape {shape}, or its labels are not one int64 for each"
                raise ValueError(message)
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
