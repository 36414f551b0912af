"""Who is told how a run goes: the pipeline tells, and the terminal or nobody listens."""

from collections.abc import Callable, Mapping
from typing import Protocol

__all__ = ["SILENT", "Watch", "counting"]


class Watch(Protocol):
    """Who is told how a run goes."""

    def stage(self, name: str, already_done: bool) -> None:
        """A stage begins, or was done by an earlier run."""

    def progress(self, done: int, total: int, terms: Mapping[str, float]) -> None:
        """How far the stage is, with the current loss terms by name where there are any."""

    def tell(self, text: str) -> None:
        """Something that a person wants to know."""


class _Silent:
    def stage(self, name: str, already_done: bool) -> None:
        """Nobody is told."""

    def progress(self, done: int, total: int, terms: Mapping[str, float]) -> None:
        """Nobody is told."""

    def tell(self, text: str) -> None:
        """Nobody is told."""


SILENT = _Silent()


def counting(watch: Watch) -> Callable[[int, int], None]:
    """What tells `watch` how far a stage is that has no loss."""
    return lambda done, total: watch.progress(done, total, {})
