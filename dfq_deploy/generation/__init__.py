"""Generation: calibration images out of the network itself, when there are no real ones.

A model and options come in, an `ImageSet` goes out. One image-optimisation loop (`engine`) serves every recipe in
`generators`; a recipe says what is captured (`taps`), which `losses` are weighed and on which schedule. This room
knows models and images; it knows nothing of plans, ONNX or run-times, and this file loads no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["GenerateOptions", "Progress", "quiet"]

Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called with the steps done, the steps in all and the mean of each loss term since the last call, by name."""


def quiet(_step: int, _steps: int, _terms: Mapping[str, float]) -> None:
    """A `Progress` that shows nothing."""


@dataclass(frozen=True)
class GenerateOptions:
    """What is asked of a generator; the recipe of the run has checked it.

    Attributes:
        count: Number of images, at least 1.
        seed: Seed of everything random, at least 0; the same seed gives the same bytes on the same machine.
        exact: Compute as the paper's authors do, instead of the fast form of the same recipe.
        keep_in: Folder in which batches that took long are kept, and found again by a run that makes the same. None:
            they are not kept.
    """

    count: int = 32
    seed: int = 0
    exact: bool = False
    keep_in: Path | None = None
