"""Collectors: who drives calibration images through a model and brings home ranges.

Activations get the ranges that the collector's run-time finds; weights are always read off the torch model, per output
channel, and so are ranges that are fixed by definition.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from calibrators.affine import Codes
from calibrators.errors import RecipeError
from calibrators.images import ImageSet
from calibrators.ranges import Ranges

if TYPE_CHECKING:  # listing the collectors' names must not load torch
    from torch import nn

__all__ = ["Collector", "Subject", "check_observer", "described"]


@dataclass(frozen=True)
class Subject:
    """The model that ranges are collected of.

    Attributes:
        module: The torch model with sites, in evaluation mode.
        fingerprint: Of its name and weights, recorded with the ranges.
        onnx: Its float ONNX form with nodes named by layer; for collectors that ask for it with `NEEDS_ONNX`.
    """

    module: "nn.Module"
    fingerprint: str
    onnx: Path | None = None


class Collector(Protocol):
    """What each module in this folder offers."""

    OBSERVERS: tuple[str, ...]
    NEEDS_ONNX: bool

    def check(self, observer: str, codes: Codes | None) -> None:
        """Nothing, if this collector could begin now: the run-time is there, and the observer is, for that format."""
        ...

    def collect_ranges(
        self,
        subject: Subject,
        images: ImageSet,
        *,
        observer: str,
        percentile: float,
        codes: Codes | None,
        progress: Callable[[int, int], object] = ...,
    ) -> Ranges:
        """Ranges of every site of the subject that `images` reach.

        Args:
            subject: The model.
            images: Calibration images.
            observer: One of `OBSERVERS`.
            percentile: Matters to that observer only.
            codes: The format that activations shall get, or None; matters to observers that search its best range.
            progress: Called with images done and in all.
        """
        ...


def check_observer(collector: str, observer: str, offered: tuple[str, ...]) -> None:
    """Nothing, if `observer` is one of those that `collector` has.

    Raises:
        RecipeError: It is none.
    """
    if observer not in offered:
        raise RecipeError(
            what=f"the collector `{collector}` has no observer `{observer}`.",
            why=f"it has {', '.join(offered)}.",
            fix="pass one of those with --observer, or another --collector.",
        )


def described(observer: str, percentile: float, codes: Codes | None) -> str:
    """The observer with what it was set to, for people and fingerprints; only where it depends on it."""
    if observer == "percentile":
        return f"percentile {percentile}"
    return observer if codes is None or observer == "minmax" else f"{observer} for {codes.name}"
