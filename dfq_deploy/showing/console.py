"""The terminal that all results are printed on, and the colours of their verdicts."""

import math

from rich.console import Console

__all__ = ["COLOURS", "STUDENT", "console", "decibels"]

console = Console(highlight=False, markup=False, soft_wrap=True)  # names may hold brackets: they are no markup
COLOURS = {
    "pass": "green",
    "fail": "red",
    "undecided": "yellow",
    "left out": "dim",
    "ok": "green",
    "absent": "dim",
    "problem": "red",
    "good": "green",
    "bad": "red",
    "doubtful": "yellow",
}
STUDENT = "the weights are those of a student that came with the images; float has the model's own"


def decibels(value: float) -> str:
    """An SQNR to a tenth of a decibel, or what it means where it is not finite."""
    return f"{value:.1f}" if math.isfinite(value) else "no noise" if value > 0 else "NaN"
