"""Ranges from the torch model itself: the default, with all observers that there are."""

from collections.abc import Callable

from calibrators.affine import Codes
from calibrators.collectors import Subject, check_observer, described
from calibrators.images import ImageSet
from calibrators.observers import OBSERVERS, Observer, observer_named
from calibrators.observing import observed
from calibrators.ranges import Ranges
from calibrators.sites import channel_weights

__all__ = ["NEEDS_ONNX", "OBSERVERS", "check", "collect_ranges"]

NEEDS_ONNX = False


def check(observer: str, codes: Codes | None) -> None:
    """Nothing, if `observer` is one of `OBSERVERS` and can find a range for `codes`.

    Raises:
        RecipeError: It is none, or cannot.
    """
    check_observer("pytorch", observer, OBSERVERS)
    observer_named(observer, 100, codes)


def collect_ranges(
    subject: Subject,
    images: ImageSet,
    *,
    observer: str,
    percentile: float,
    codes: Codes | None,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> Ranges:
    """Ranges of every site that `images` reach, in float32.

    Raises:
        PlanError: NaN or Inf passed a site; the message names it and the image.
    """
    check(observer, codes)
    weights = channel_weights(subject.module)

    def watching(site: str) -> Observer:
        return observer_named(observer, percentile, codes, weights.get(site))

    seen = observed(subject.module, images, watching, progress=progress)
    return Ranges(seen, subject.fingerprint, images.fingerprint, described(observer, percentile, codes))
