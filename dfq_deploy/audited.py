"""What an audit of calibration images found, and its verdict in one sentence with the figures that carry it.

The verdict rests on real images where there are some. Without them it rests on another seed of the same generator,
which shows whether the ranges are chance, and on noise, which shows whether they were worth making; with noise alone
there is nothing to decide by.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dfq_deploy.coverage import NOISE, SiteCoverage
from dfq_deploy.measures import without_nan

__all__ = ["LIMITS_PPM", "REAL", "SEED", "Audit", "Level", "judged"]

REAL, SEED = "real", "seed"
Level = Literal["good", "doubtful", "bad"]

# Limits, ours. On DeiT-T in w8a8, photographs lose 100 ppm to the ranges of other photographs or of 16 dfq images, and
# 6,000 ppm to those of noise, which costs 2 dB of SQNR; a range that is 2^0.5 times too wide costs 3 dB.
LIMITS_PPM = (1_000.0, 10_000.0)
"""Values cut off at one site from which on a set is doubtful, and bad."""
_DOUBTFUL_PPM, _BAD_PPM = LIMITS_PPM
_DOUBTFUL_DRIFT, _BAD_DRIFT = 0.5, 1.5
_BY = {
    REAL: "by real images",
    SEED: "by another seed and noise, for want of real images",
    NOISE: "by noise alone, which decides nothing",
}
_WHOSE = {REAL: "real images'", SEED: "another seed's", NOISE: "noise's"}


@dataclass(frozen=True)
class Audit:
    """How calibration images fare against others.

    Attributes:
        model: The model's name.
        scheme: Name of the scheme whose formats were looked at.
        backend: The run-time that they were placed for.
        observer: What read the ranges, with what it was set to.
        n: Number of audited images.
        images: Where they come from.
        of: Fingerprints of the audited images and of the model, by `images` and `model`.
        others: What they were compared with: where `noise`, `seed` and `real` come from.
        absent: Which of these there are not, and why.
        sites: Each quantized activation, in the model's order.
        held_against: The one of `others` that the verdict rests on.
        level: `good`, `doubtful` or `bad`.
        verdict: The level in words.
        pictures: Names of the pictures that were drawn.
        left_out: Why others were not.
    """

    model: str
    scheme: str
    backend: str
    observer: str
    n: int
    images: str
    of: Mapping[str, str]
    others: Mapping[str, str]
    absent: Mapping[str, str]
    sites: tuple[SiteCoverage, ...]
    held_against: str
    level: Level
    verdict: str
    pictures: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def worst(self, other: str) -> SiteCoverage:
        """The site at which most of the values of `other` are cut off."""
        return _worst(self.sites, other)

    def drifts(self, other: str) -> list[float]:
        """How many times as wide the ranges are as those of `other`, as powers of two, ascending."""
        return sorted(site.others[other].drift for site in self.sites)

    def report(self) -> dict[str, Any]:
        """The findings as JSON; None for what is not finite."""
        found: dict[str, Any] = without_nan(asdict(self))
        return found


def judged(sites: Sequence[SiteCoverage]) -> tuple[str, Level, str]:
    """What the verdict rests on, the level, and the verdict."""
    against = next(name for name in (REAL, SEED, NOISE) if name in sites[0].others)
    excess = _worst(sites, against).others[against].excess_ppm
    drift = abs(_median_drift(sites, against))
    level: Level = "good"
    useless = against == SEED and _most_by_noise(sites, SEED)[0] <= _DOUBTFUL_PPM
    if against == NOISE or useless or excess > _DOUBTFUL_PPM or drift > _DOUBTFUL_DRIFT:
        level = "doubtful"
    if against != NOISE and (excess > _BAD_PPM or drift > _BAD_DRIFT):
        level = "bad"
    verdict = "; ".join([_held(sites, against), *_asides(sites, against, useless)])
    return against, level, f"{_BY[against]}: {verdict}."


def _held(sites: Sequence[SiteCoverage], against: str) -> str:
    """How the other set's values fare, and how wide the ranges are beside its own."""
    worst = _worst(sites, against)
    over = sum(site.others[against].excess_ppm > _DOUBTFUL_PPM for site in sites)
    cut_off = _percent(worst.others[against].excess_ppm)
    text = f"ranges hold {100 - _DOUBTFUL_PPM / 1e4:g} % of {_WHOSE[against]} values at every site"
    if over:
        text += f" but {worst.site} ({cut_off} cut off)" + (f" and {over - 1} more" if over > 1 else "")
    else:
        text += f" (at most {cut_off} is cut off, at {worst.site})"
    return f"{text} and are {2 ** _median_drift(sites, against):.2f} times as wide as theirs (median)"


def _asides(sites: Sequence[SiteCoverage], against: str, useless: bool) -> list[str]:
    """What noise would have done, and how far another seed moves the ranges."""
    found = []
    if against != NOISE:
        most, site = _most_by_noise(sites, against)
        noise = "noise's would hold them as well: they would cut" if useless else "noise's would have cut"
        found.append(f"{noise} off at most {_percent(most)} ({site})")
    if SEED in sites[0].others:
        moved = sorted((abs(site.others[SEED].drift), site.site) for site in sites)
        middle = statistics.median(drift for drift, _ in moved)
        found.append(
            f"another seed moves ranges by {_moved(middle)} (median), {_moved(moved[-1][0])} at most ({moved[-1][1]})"
        )
    return found


def _worst(sites: Sequence[SiteCoverage], other: str) -> SiteCoverage:
    return max(sites, key=lambda site: site.others[other].excess_ppm)


def _most_by_noise(sites: Sequence[SiteCoverage], other: str) -> tuple[float, str]:
    """The largest share of the values of `other` that noise's formats cut off, in ppm, and where that is."""
    worst = max(sites, key=lambda site: site.others[other].noise_excess_ppm)
    return worst.others[other].noise_excess_ppm, worst.site


def _median_drift(sites: Sequence[SiteCoverage], other: str) -> float:
    return statistics.median(site.others[other].drift for site in sites)


def _percent(ppm: float) -> str:
    return f"{ppm / 1e4:.2g} %"


def _moved(drift: float) -> str:
    return f"{100 * (2**drift - 1):.0f} %"
