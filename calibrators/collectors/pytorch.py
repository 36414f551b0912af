"""Ranges from the torch model itself: the default, and the only one that streams every observer it has."""

from collections.abc import Callable

from calibrators.collectors import Subject, check_observer, described
from calibrators.images import ImageSet
from calibrators.observers import OBSERVERS as _OBSERVERS
from calibrators.observers import observer_named
from calibrators.observing import observed
from calibrators.plan import Ranges

__all__ = ["NEEDS_ONNX", "OBSERVERS", "check", "collect_ranges"]

OBSERVERS = tuple(_OBSERVERS)
NEEDS_ONNX = False


def check(observer: str) -> None:
    """Nothing, if `observer` is one of `OBSERVERS`.

    Raises:
        RecipeError: It is none.
    """
    check_observer("pytorch", observer, OBSERVERS)


def collect_ranges(
    subject: Subject,
    images: ImageSet,
    *,
    observer: str,
    percentile: float,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> Ranges:
    """Ranges of every site that `images` reach, in float32.

    Raises:
        PlanError: NaN or Inf passed a site; the message names it.
    """
    check(observer)
    seen = observed(subject.module, images, lambda: observer_named(observer, percentile), progress=progress)
    return Ranges(seen, subject.fingerprint, images.fingerprint, described(observer, percentile))
