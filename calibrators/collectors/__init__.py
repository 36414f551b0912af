"""Collectors: who drives calibration images through a model and brings home ranges."""

from collections.abc import Callable
from typing import Protocol

from torch import nn

from calibrators.images import ImageSet
from calibrators.observers import Observer
from calibrators.plan import Ranges

__all__ = ["Collector"]


class Collector(Protocol):
    """What each module in this folder offers."""

    def collect_ranges(
        self,
        module: nn.Module,
        images: ImageSet,
        *,
        model_fingerprint: str,
        observer: Callable[[], Observer],
        observer_name: str,
        batch_size: int = ...,
        progress: Callable[[int, int], object] = ...,
    ) -> Ranges:
        """Ranges of every site of `module` that `images` reach."""
        ...
