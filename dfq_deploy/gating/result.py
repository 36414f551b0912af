"""What a gate found: its checks, each with a verdict and the reason for it, and the verdict over all."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from calibrators.files import sha256_of, write_json, write_text
from dfq_deploy.gating.writers import write_junit, write_markdown
from dfq_deploy.measures import without_nan
from dfq_deploy.statistics import Interval
from exporters.bundle import MANIFEST

__all__ = ["GateCheck", "GateResult", "Mode", "Verdict", "sums_of", "worst_of"]

Mode = Literal["labels", "synthetic"]
Verdict = Literal["pass", "fail", "undecided"]
_DIGITS = 4
_ALL = 100.0  # points


@dataclass(frozen=True)
class GateCheck:
    """One check.

    Attributes:
        name: What is checked.
        value: What was found.
        limit: What it is held against.
        interval: Where the value lies with 95 % confidence; the value twice where chance has no part in it.
        verdict: `pass` where the whole interval is inside the limits, `fail` where it is wholly outside.
        reason: The verdict in words.
    """

    name: str
    value: float
    limit: float
    interval: Interval
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class GateResult:
    """A gate's verdict and what it rests on.

    Attributes:
        bundle: Name of its folder or archive.
        verdict: The worst of the checks'.
        mode: `labels`: accuracy was measured. `synthetic`: there are no labels; what was measured is whether the engine
            computes its plan, and how often it decides as float does.
        n: Number of images.
        images: Where they come from.
        checks: All checks that were made.
        left_out: Checks that could not be made, with the reason.
        smallest_detectable_drop_pt: Points of top-1, of agreement with float where there are no labels, that would have
            to be lost for these images to show it with 80 % power; None where an image has no one decision.
        manifest_sha256: Of the bundle's manifest, which holds the hashes of its files.
        changes: What an update changed in the baseline, a line each.
    """

    bundle: str
    verdict: Verdict
    mode: Mode
    n: int
    images: str
    checks: tuple[GateCheck, ...]
    left_out: dict[str, str]
    smallest_detectable_drop_pt: float | None
    manifest_sha256: str
    changes: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        """What was measured on what, in words."""
        if not self.n:
            return "no images were looked at"
        seen = f"{self.n} images, {self.images}"
        if self.mode == "labels":
            return f"accuracy against labels on {seen}"
        return f"no labels, so no accuracy: whether the engine computes its plan, and agreement with float, on {seen}"

    @property
    def power(self) -> str:
        """What the images could have shown, in words; empty where none was looked at."""
        if not self.n or self.smallest_detectable_drop_pt is None:
            return ""
        of = "top-1" if self.mode == "labels" else "agreement with float"
        return f"the smallest drop in {of} that {self.n} images show with 80 % power: " + (
            f"{self.smallest_detectable_drop_pt:.2f} points" if self.smallest_detectable_drop_pt < 100.0 else "none"
        )

    @property
    def detectable(self) -> float:
        """`smallest_detectable_drop_pt` as a number: all where images have no one class and no drop can be seen."""
        return _ALL if self.smallest_detectable_drop_pt is None else self.smallest_detectable_drop_pt

    def report(self) -> dict[str, Any]:
        """The verdict as JSON; an end of an interval that is not finite is None."""
        found: dict[str, Any] = without_nan(
            {
                "verdict": self.verdict,
                "mode": self.mode,
                "n": self.n,
                "checks": [
                    {
                        "name": check.name,
                        "value": _rounded(check.value),
                        "limit": _rounded(check.limit),
                        "interval": [_rounded(end) for end in check.interval],
                        "verdict": check.verdict,
                    }
                    for check in self.checks
                ],
                "smallest_detectable_drop_pt": _rounded(self.detectable),
            }
        )
        return found

    def save(self, path: Path) -> None:
        """Write the report as a JSON file; into a bundle's folder with whose verdict it is, for `dfq-deploy report`."""
        write_json(path, self.report())
        if (path.parent / MANIFEST).is_file():
            write_text(path.with_suffix(".sha256"), sums_of(self.manifest_sha256, path))

    def save_junit(self, path: Path) -> None:
        """Write the checks as JUnit XML."""
        write_junit(self, path)

    def save_markdown(self, path: Path) -> None:
        """Write the checks as a Markdown table."""
        write_markdown(self, path)


def worst_of(checks: Sequence[GateCheck]) -> Verdict:
    """`fail` if one check failed, else `undecided` if one is, else `pass`."""
    verdicts = {check.verdict for check in checks}
    return next((verdict for verdict in ("fail", "undecided") if verdict in verdicts), "pass")


def sums_of(manifest_sha256: str, report: Path) -> str:
    """What `sha256sum` prints of the manifest that was judged and of the report beside it."""
    return f"{manifest_sha256}  {MANIFEST}\n{sha256_of(report)}  {report.name}\n"


def _rounded(value: float) -> float:
    """Four digits after the point, or four that count where there is less."""
    return round(value, _DIGITS) if abs(value) >= 1 else float(f"{value:.{_DIGITS}g}")
