"""What a benchmark of generators found: a row per number format, chain of refine passes and kind of images.

Means and deviations over seeds, how far each generator goes from noise to real images, and the same as JSON and as a
markdown table. It knows no model and computes no logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from calibrators.files import write_json, write_text
from dfq_deploy.generator_bench.recipe import NOISE, REAL
from dfq_deploy.measures import without_nan

__all__ = ["Gap", "GeneratorBench", "Result", "Row", "Spread", "gaps_of"]

_TITLES = (
    *("scheme", "refine", "images", "points lost", "top-1, %", "= float, %", "SQNR, dB"),
    *("way, = float, %", "way, top-1, %", "made in, s", "forward", "backward"),
)
_MEASURES = {"agreement": "agreement with float", "top1": "top-1"}


@dataclass(frozen=True)
class Spread:
    """Mean of a figure over the seeds, and its standard deviation; None where there is one seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of a sample."""
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)

    def shown(self, digits: int) -> str:
        """`71.25 ± 0.31`."""
        return f"{self.mean:.{digits}f}" + ("" if self.deviation is None else f" ± {self.deviation:.{digits}f}")


@dataclass(frozen=True)
class Result:
    """What one set of images gave.

    Attributes:
        seed: The seed of the images.
        drop: Points of top-1 that are lost against float.
        top1: Label accuracy, in percent.
        agreement: Top-1 agreement with float, in percent.
        sqnr_db: Signal to quantization noise of the logits.
        seconds: Wall time that it took to make the images; None for real ones.
        forward: Forward passes of the whole network per image; None for real ones.
        backward: Backward passes of it.
        threads: Threads that torch computed them with, which the seconds depend on; None for real ones.
    """

    seed: int
    drop: float
    top1: float
    agreement: float
    sqnr_db: float
    seconds: float | None
    forward: float | None
    backward: float | None
    threads: int | None


@dataclass(frozen=True)
class Row:
    """All seeds of one generator under one quantizer.

    Attributes:
        scheme: The number formats.
        refine: The refine passes, as asked for.
        generator: What made the images; `real` for real ones.
        results: One per seed.
        recovered: How far it goes from noise (0) to real images (100) by `agreement` and by `top1`, over the seeds; 0
            and 100 are the means of these. None where their gap is too small to tell, see `Gap`.
    """

    scheme: str
    refine: str
    generator: str
    results: tuple[Result, ...]
    recovered: Mapping[str, Spread | None] = field(default_factory=dict)

    def between(self, gaps: Sequence["Gap"]) -> "Row":
        """The row with how far it goes between the ends of the gaps."""
        return replace(self, recovered={gap.measure: gap.shares(self.results) for gap in gaps})

    def spread(self, figure: str) -> Spread | None:
        """A figure of the results over the seeds; None where real images have none."""
        values = [getattr(result, figure) for result in self.results]
        return None if None in values else Spread.of(values)

    def shown(self, figure: str, digits: int = 2) -> str:
        """A figure for people."""
        spread = self.spread(figure)
        return "" if spread is None else spread.shown(digits)

    def shares(self) -> tuple[str, ...]:
        """How far it goes by each measure, for people."""
        return tuple("" if share is None else share.shown(0) for share in map(self.recovered.get, _MEASURES))

    def passes(self) -> tuple[str, ...]:
        """Mean number of forward and of backward passes, for people."""
        spreads = (self.spread("forward"), self.spread("backward"))
        return tuple(f"{spread.mean:.0f}" if spread else "" for spread in spreads)

    def __str__(self) -> str:
        seconds = self.shown("seconds", 1)
        return (
            f"{self.scheme}, {self.refine}, {self.generator}: agrees with float on {self.shown('agreement')} %, "
            f"loses {self.shown('drop')} points{seconds and f'; {seconds} s to make'}"
        )


@dataclass(frozen=True)
class Gap:
    """How much better real images are than noise under one quantizer.

    Attributes:
        scheme: The number formats.
        refine: The refine passes, as asked for.
        measure: `agreement` or `top1`.
        noise: Mean with noise; None if it was not asked for.
        real: Mean with real images; None if there were none.
        why: Why nothing can be called a share of the gap; None if it can. Of one seed no deviation is known,
            and any gap that is positive counts.
    """

    scheme: str
    refine: str
    measure: str
    noise: float | None
    real: float | None
    why: str | None

    def share(self, value: float) -> float | None:
        """Where `value` lies between noise and real images, in percent."""
        if self.why is not None or self.noise is None or self.real is None:
            return None
        return 100.0 * ((value - self.noise) / (self.real - self.noise))

    def shares(self, results: Sequence[Result]) -> Spread | None:
        """Where each of `results` lies, over the seeds; their mean lies where the mean of the results does."""
        shares = [self.share(getattr(result, self.measure)) for result in results]
        return Spread.of([share for share in shares if share is not None]) if None not in shares else None


def gaps_of(rows: Sequence[Row]) -> tuple[Gap, ...]:
    """The gap of each measure, from the rows of one quantizer."""
    found = []
    for measure in _MEASURES:
        ends = {row.generator: row.spread(measure) for row in rows}
        noise, real = ends.get(NOISE), ends.get(REAL)
        found.append(
            Gap(
                rows[0].scheme,
                rows[0].refine,
                measure,
                noise=noise.mean if noise else None,
                real=real.mean if real else None,
                why=_why_none(measure, noise, real),
            )
        )
    return tuple(found)


def _why_none(measure: str, noise: Spread | None, real: Spread | None) -> str | None:
    """Why the gap is none that a share of could be told; None if it is one."""
    if real is None:
        return "there were no real images"
    if noise is None:
        return "noise was not among the generators"
    gap, spread = real.mean - noise.mean, (noise.deviation or 0.0) + (real.deviation or 0.0)
    told = f"by {_MEASURES[measure]} real images are {gap:+.2f} points from noise"
    if not gap > 0:
        return f"{told}, no better"
    return f"{told}, within the deviations of both ({spread:.2f} together)" if gap <= spread else None


@dataclass(frozen=True)
class GeneratorBench:
    """A benchmark of generators.

    Attributes:
        model: The model's name.
        float_top1: The float model's label accuracy, in percent.
        n: Number of images that it was measured on.
        images: Where they come from.
        settings: What was asked for.
        versions: Of everything that the figures depend on.
        gaps: From noise to real images, per quantizer and measure.
        rows: What was found, quantizer after quantizer.
    """

    model: str
    float_top1: float
    n: int
    images: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    gaps: tuple[Gap, ...]
    rows: tuple[Row, ...]

    def report(self) -> dict[str, Any]:
        """All figures as JSON: None for what is not finite; each row has its spreads beside its results."""
        found: dict[str, Any] = asdict(self)
        for row, written in zip(self.rows, found["rows"], strict=True):
            for figure in ("drop", "top1", "agreement", "sqnr_db", "seconds", "forward", "backward"):
                spread = row.spread(figure)
                written[figure] = spread and asdict(spread)
        clean: dict[str, Any] = without_nan(found)
        return clean

    def markdown(self) -> str:
        """The rows as a markdown table, what ± leaves out, and why a share is missing."""
        lines = [f"| {' | '.join(_TITLES)} |", "|---" * len(_TITLES) + "|"]
        for row in self.rows:
            figures = (row.shown(figure) for figure in ("drop", "top1", "agreement", "sqnr_db"))
            cells = (row.scheme, row.refine, row.generator, *figures, *row.shares(), row.shown("seconds", 1))
            lines.append(f"| {' | '.join((*cells, *row.passes()))} |")
        head = f"{self.model}: float top-1 {self.float_top1:.2f} %, {self.n} images, {self.images}"
        return "\n".join([head, "", *lines, "", *(f"- {note}." for note in (self.doubt, *self.notes()))]) + "\n"

    @property
    def doubt(self) -> str:
        """What the deviations leave out."""
        return f"the sampling error of the {self.n} images is not in ±: one of them is {100 / self.n:.2f} %"

    def passes(self) -> str:
        """Mean number of forward and of backward passes by generator, for people; several where schemes differ."""
        counts: dict[str, dict[str, None]] = {}
        for row in self.rows:
            if any(row.passes()):
                counts.setdefault(row.generator, {})[" / ".join(row.passes())] = None
        return ", ".join(f"{generator} {' or '.join(found)}" for generator, found in counts.items())

    def notes(self) -> tuple[str, ...]:
        """Why nothing is said of how far a generator goes from noise to real images, each reason once."""
        return tuple(dict.fromkeys(f"{gap.scheme}, {gap.refine}: {gap.why}" for gap in self.gaps if gap.why))

    def save(self, folder: Path) -> None:
        """Write `generators.json` and `generators.md`."""
        write_json(folder / "generators.json", self.report())
        write_text(folder / "generators.md", self.markdown())
