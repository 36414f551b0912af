"""What a sweep found: a row per run, as JSON, as a markdown table, and as one verdict. It runs nothing."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrators.files import write_json, write_text
from dfq_deploy.sweeping.file import NAMED_BY

__all__ = ["Outcome", "Sweep"]

_TITLES = ("run", "verdict", "top-1, %", "points lost", "= float, %", "SQNR, dB", "MiB", "s", "why")


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        name: The run's folder.
        recipe: Every field of its recipe.
        found: The check, the engine's size in bytes and the seconds that the run took, when it last ran; None if it
            failed.
        error: What went wrong, why, and what to do; None if nothing did.
    """

    name: str
    recipe: Mapping[str, Any]
    found: Mapping[str, Any] | None
    error: Mapping[str, str] | None

    @property
    def verdict(self) -> str:
        """`pass`, `fail`, `undecided`, or `error`."""
        return "error" if self.found is None else str(self.found["verdict"])

    def cells(self) -> tuple[str, ...]:
        """The row of a table for people."""
        if self.found is None:
            assert self.error is not None
            return (self.name, self.verdict, "", "", "", "", "", "", f"{self.error['what']} {self.error['why']}")
        found = self.found
        top1 = "" if found["top1"] is None else f"{found['top1']['engine']:.2f}"
        drop = "" if found["drop"] is None else "{:.2f} ({:.1f} to {:.1f})".format(*found["drop"])
        sqnr = found["sqnr_db"]["engine_float"]
        figures = (f"{found['agreement']['engine_float']:.2f}", "" if sqnr is None else f"{sqnr:.1f}")
        size = f"{found['bytes'] / 2**20:.1f}"
        why = "" if self.verdict == "pass" else found["reason"]
        return (self.name, self.verdict, top1, drop, *figures, size, f"{found['seconds']:.0f}", why)

    def __str__(self) -> str:
        return ": ".join(part for part in (self.name, self.verdict, self.cells()[-1]) if part)


@dataclass(frozen=True)
class Sweep:
    """All runs of a sweep, in the order of its file.

    Attributes:
        outcomes: What each came to.
        versions: Of everything that the figures depend on.
    """

    outcomes: tuple[Outcome, ...]
    versions: Mapping[str, str]

    @property
    def counts(self) -> Mapping[str, int]:
        """How many runs there are by verdict."""
        return Counter(outcome.verdict for outcome in self.outcomes)

    @property
    def verdict(self) -> str:
        """`fail` where a run failed or broke down, else `undecided` where one is, else `pass`."""
        if self.counts.keys() & {"fail", "error"}:
            return "fail"
        return "undecided" if "undecided" in self.counts else "pass"

    def rows(self) -> Iterator[tuple[str, ...]]:
        """The rows of a table for people: beside its name, a run has the fields that tell it from the others."""
        fields = {key for one in self.outcomes for key in one.recipe} - set(NAMED_BY)
        telling = [key for key in sorted(fields) if len({str(one.recipe.get(key)) for one in self.outcomes}) > 1]
        for one in self.outcomes:
            name, *figures = one.cells()
            told = ", ".join(f"{key} {one.recipe[key]}" for key in telling if key in one.recipe)
            yield (f"{name} ({told})" if told else name, *figures)

    def report(self) -> dict[str, Any]:
        """All of it as JSON."""
        runs = [
            {"name": one.name, "verdict": one.verdict, "recipe": one.recipe, "found": one.found, "error": one.error}
            for one in self.outcomes
        ]
        return {"verdict": self.verdict, "counts": dict(self.counts), "versions": dict(self.versions), "runs": runs}

    def markdown(self) -> str:
        """A row per run."""
        lines = [f"| {' | '.join(_TITLES)} |", "|---" * len(_TITLES) + "|"]
        for row in self.rows():
            cells = (cell.replace("|", "\\|") for cell in row)
            lines.append(f"| {' | '.join(cells)} |")
        counts = ", ".join(f"{count} {verdict}" for verdict, count in self.counts.items())
        return "\n".join([f"{len(self.outcomes)} runs: {counts}", "", *lines]) + "\n"

    def save(self, folder: Path) -> None:
        """Write `sweep.json` and `sweep.md`."""
        write_json(folder / "sweep.json", self.report())
        write_text(folder / "sweep.md", self.markdown())
