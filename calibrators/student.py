"""A student: weights that came about together with calibration images, for the model that is calibrated on them.

It lies in the file of the images and is part of their fingerprint. No torch here, as images need none.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["Student"]


@dataclass(frozen=True)
class Student:
    """What a model gets for weights before it is quantized, in place of its own.

    Attributes:
        weights: Those that differ from the model's, by name, float32.
        model: Fingerprint of the model that it learned from.
        scheme: Name of the scheme that it was rounded by while it learned.
    """

    weights: Mapping[str, np.ndarray]
    model: str
    scheme: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the weights and what they are for."""
        digest = hashlib.sha256(f"{self.model} {self.scheme}".encode())
        for name, value in sorted(self.weights.items()):
            digest.update(f" {name} {value.shape} ".encode() + np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()
