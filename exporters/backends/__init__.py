"""Backends: one file per run-time, each with the same three verbs. No torch.

A backend says what it cannot run before it tries, turns an ONNX file with Q/DQ into what it loads, and runs it.
"""

from pathlib import Path
from typing import Protocol

import numpy as np

from calibrators.plan import QuantPlan
from exporters.census import Census

__all__ = ["Backend", "Engine"]


class Engine(Protocol):
    """A loaded model."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits (N, classes) float32 of images (N, C, H, W) float32."""
        ...

    def close(self) -> None:
        """Free what the engine holds; it cannot be called afterwards."""
        ...


class Backend(Protocol):
    """What each module in this folder offers."""

    def check(self, plan: QuantPlan) -> None:
        """Return if this backend can run the plan; raise BackendError with the reason if not."""
        ...

    def build(self, model: Path, plan: QuantPlan) -> Census:
        """Make the file `model` runnable here, and say what each layer is computed in."""
        ...

    def load(self, model: Path, *, provider: str) -> Engine:
        """The engine of the file `model`."""
        ...
