"""Generation: calibration images out of the network itself, when there are no real ones.

A model and options come in, an `ImageSet` goes out. One image-optimisation loop (`engine`) serves every recipe in
`generators`; a recipe says what is captured (`taps`), which `losses` are weighed and on which schedule. This room
knows models and images. It knows nothing of ONNX or run-times, and of a plan only that it may be handed one to teach a
student by; this file loads no torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from calibrators.images import ImageSet
from calibrators.plan import QuantPlan

if TYPE_CHECKING:  # the list of generators is shown without loading torch
    from dfq_deploy.models import Model

__all__ = ["BATCH", "Elsewhere", "Formats", "GenerateOptions", "Progress", "quiet"]

BATCH = 32
"""Images that are made together, at most."""


class Formats(Protocol):
    """Called with a model and images, gives the plan that calibration on these images would."""

    @property
    def facts(self) -> Sequence[object]:
        """All that decides on the formats, JSON-serialisable."""

    def __call__(self, model: "Model", images: ImageSet) -> QuantPlan:
        """The plan."""


Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called with the steps done, the steps in all and the mean of each loss term since the last call, by name."""

Elsewhere = Callable[[str, Sequence[tuple[int, int]], Progress], None]
"""Called with a generator's name and batches, each the number of its first image and its size: has other machines make
them, and puts the files in which they keep a batch where this one looks for its own."""


def quiet(_step: int, _steps: int, _terms: Mapping[str, float]) -> None:
    """A `Progress` that shows nothing."""


@dataclass(frozen=True)
class GenerateOptions:
    """What is asked of a generator; the recipe of the run has checked it.

    Attributes:
        count: Number of images, at least 1.
        seed: Seed of everything random, at least 0; the same seed gives the same bytes on the same machine.
        exact: Compute as the paper's authors do, instead of the fast form of the same recipe.
        formats: What a student is to be rounded to, where the generator has one. None: there is none.
        keep_in: Folder in which batches that took long are kept, and found again by a run that makes the same. None:
            they are not kept.
        first: Number of the first of them among all that the seed gives, a multiple of `BATCH`; they are those that
            stand there in a set that begins at 0.
        device: What computes them, `cpu` or `cuda`; it is there. The model is moved to it and back.
        elsewhere: Who has the batches made that `keep_in` does not hold yet. None: they are made here.
    """

    count: int = BATCH
    seed: int = 0
    exact: bool = False
    formats: Formats | None = None
    keep_in: Path | None = None
    first: int = 0
    device: str = "cpu"
    elsewhere: Elsewhere | None = None
