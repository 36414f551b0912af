"""A verdict in a person's words: what was found, what it means, and what to do about it."""

import re
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape

from dfq_deploy.reporting.facts import Run
from dfq_deploy.tasks import task_named
from exporters.bundle import Manifest

__all__ = ["Verdict", "agreement_said", "breakable", "milliseconds", "pieces", "signed", "size", "verdict_on"]

Level = Literal["pass", "fail", "undecided", "unknown"]
_WORDS: dict[str, str] = {"pass": "Pass", "fail": "Fail", "undecided": "Undecided"}


@dataclass(frozen=True)
class Verdict:
    """The verdict on a bundle.

    Attributes:
        level: `pass`, `fail`, `undecided`, or `unknown` where nobody has checked.
        word: That in a word.
        computes: Whether the engine computes what its plan says.
        keeps: What that does to accuracy.
        reason: The check's own words.
        doubt: Why what was found may not be of this engine; empty where it is.
    """

    level: Level
    word: str
    computes: str
    keeps: str
    reason: str = ""
    doubt: str = ""


def verdict_on(run: Run) -> Verdict:
    """The verdict on a run."""
    checked = run.checked
    if checked is None:
        return Verdict("unknown", "Not checked", "Nobody has compared this engine with its reference yet.", "")
    computes = {
        "pass": "The engine computes what its plan of scales says, layer by layer and as a whole.",
        "fail": "The engine does not compute what its plan of scales says. Do not deploy it.",
        "undecided": "Whether the engine computes what its plan of scales says is not decided.",
    }[checked.verdict]
    stale = "These findings are of other files than the folder holds now: check it again." if _is_stale(run) else ""
    return Verdict(checked.verdict, _WORDS[checked.verdict], computes, _accuracy(run), checked.reason, stale)


def _is_stale(run: Run) -> bool:
    return run.checked is not None and run.checked.stale(run.manifest)


def _accuracy(run: Run) -> str:
    checked = run.checked
    assert checked is not None
    if checked.drop is None:
        share = f"{checked.agreement.get('engine_float', 0.0):.1f} %"
        if run.manifest.model.task != "classification":
            return f"{agreement_said(run.manifest)} with float: {share} on {pieces(checked.n, 'image')}."
        return (
            f"How accurate it is cannot be said: the {checked.n} images have no labels. "
            f"It decides as float does on {share} of them."
        )
    value, low, high = checked.drop
    between = f"95 % interval {signed(low)} to {signed(high)}"
    on = f"on {pieces(checked.n, 'labelled image')}"
    if low <= 0 <= high:
        lost = "loses" if value >= 0 else "gains"
        points = f"{abs(value):.2f} points of top-1 {on}"
        return f"Against float it {lost} {points}, no more than chance explains ({between} lost)."
    if low > 0:
        return f"Against float it loses {value:.2f} points of top-1 {on}, more than chance explains ({between})."
    return f"Against float it gains {-value:.2f} points of top-1 {on}, which chance does not explain ({between} lost)."


def agreement_said(manifest: Manifest) -> str:
    """What agreement is in this bundle's task, for a heading."""
    if manifest.model.task == "classification":
        return "Agreement: the same decision"
    measured = task_named(manifest.model.task).AGREEMENT
    return f"{measured[:1].upper()}{measured[1:]}"


def pieces(count: int, name: str) -> str:
    """`1 image`, `2 images`."""
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def signed(value: float) -> str:
    """A figure that may be negative, with a minus that is one."""
    return f"{value:.2f}".rstrip("0").rstrip(".").replace("-", "\N{MINUS SIGN}")


def milliseconds(value: float) -> str:
    """A time in ms, to three digits."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def breakable(name: str) -> Markup:
    """A name that may break behind its dots and underscores, escaped."""
    return Markup(re.sub(r"([._/])", r"\1<wbr>", str(escape(name))))


def size(count: int) -> str:
    """A number of bytes for people."""
    mib = count / 2**20
    return f"{count / 1024:.0f} KiB" if mib < 1 else f"{mib:.1f} MiB"
