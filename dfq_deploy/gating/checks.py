"""From what was measured to checks: an interval against its limits, and how many images would decide."""

import math
from collections.abc import Callable, Mapping, Sequence

from dfq_deploy.gating.result import GateCheck, Verdict
from dfq_deploy.measures import Share
from dfq_deploy.statistics import Interval, Paired, images_for_share

__all__ = ["band_check", "drop_check", "exact_check", "layers_check", "ratio_check", "share_check", "verdict_between"]


def verdict_between(interval: Interval, low: float, high: float) -> Verdict:
    """`pass` where the whole interval is within the limits, `fail` where it is wholly outside, else `undecided`."""
    if interval[0] >= low and interval[1] <= high:
        return "pass"
    return "fail" if interval[0] > high or interval[1] < low else "undecided"


def exact_check(name: str, wrong: Sequence[str], said: str) -> GateCheck:
    """A check that chance has no part in: the number of things that are wrong, of which there may be none.

    Args:
        name: The check.
        wrong: What is wrong, in words.
        said: What holds where nothing is.
    """
    count = float(len(wrong))
    more = f" ({len(wrong)} in all)" if len(wrong) > 1 else ""
    return GateCheck(
        name, count, 0.0, (count, count), "fail" if wrong else "pass", f"{wrong[0]}{more}" if wrong else said
    )


def drop_check(name: str, pair: Paired, limit: float, *, said: str, two_sided: bool = True) -> GateCheck:
    """Points that the engine loses against something else, paired per image.

    Args:
        name: The check.
        pair: The counts.
        limit: Points that may be lost.
        said: What the points are, in words.
        two_sided: A gain beyond the limit is no pass either: it needs an explanation as much as a loss does.
    """
    low, high = -limit if two_sided else -100.0, limit
    interval, value = pair.interval, pair.points
    verdict = verdict_between(interval, low, high)
    measured = (
        f"{value:+.2f} points {said} (95 % interval {interval[0]:.2f} to {interval[1]:.2f}, exact "
        f"McNemar p = {pair.p_value:.2g}); {limit:g} allowed"
    )
    if verdict == "undecided":
        measured += _more(pair.images_for(lambda ends: verdict_between(ends, low, high) != "undecided"))
    elif verdict == "fail" and interval[1] < low:
        measured += ": an improvement that nothing explains"
    return GateCheck(name, value, limit, interval, verdict, measured)


def share_check(name: str, share: Share, limit: float, *, said: str) -> GateCheck:
    """A percentage of images that has to reach a limit."""
    interval = (share.low, share.high)
    verdict = verdict_between(interval, limit, 100.0)
    measured = f"{said}: {share.percent:.2f} % (95 % interval {share.low:.2f} to {share.high:.2f}); {limit:g} needed"
    if verdict == "undecided":
        measured += _more(
            images_for_share(share.percent, share.n, lambda ends: verdict_between(ends, limit, 100.0) != "undecided")
        )
    return GateCheck(name, share.percent, limit, interval, verdict, measured)


def ratio_check(
    name: str, ratio: tuple[float, float, float], limit: float, *, n: int, found: tuple[Verdict, str]
) -> GateCheck:
    """A ratio of distances whose verdict was found elsewhere; an interval shrinks with the root of the images."""
    value, low, high = ratio
    verdict, reason = found
    if verdict == "undecided":
        end = low if value > limit else high
        shrunk = ((end - value) / (limit - value)) ** 2 if math.isfinite(end) and value != limit else 0.0
        reason += _more(math.ceil(n * shrunk)) if shrunk else ": undecided, use more images"
    return GateCheck(name, value, limit, (low, high), verdict, reason)


def band_check(
    name: str, measured: tuple[float, Interval], before: float, band: float, *, say: Callable[[float], str]
) -> GateCheck:
    """A value that has to stay within `band` percent of what it was before, either way.

    Args:
        name: The check.
        measured: The value and its interval.
        before: What it was in the baseline.
        band: Percent.
        say: The value in words.
    """
    value, interval = measured
    low, high = before * (1 - band / 100), before * (1 + band / 100)
    verdict = verdict_between(interval, low, high)
    reason = f"{say(value)}, {say(before)} in the baseline; {band:g} % either way allowed"
    if verdict == "fail" and interval[1] < low:
        reason += ": an improvement; if it is meant, write the baseline anew with --update"
    elif verdict == "undecided":
        reason += f" (95 % interval {say(interval[0])} to {say(interval[1])}): measure on a quieter machine"
    return GateCheck(name, value, low if value < before else high, interval, verdict, reason)


def layers_check(errors: Mapping[str, float], tolerance: Mapping[str, float]) -> GateCheck:
    """Each layer on its reference's own input: the largest deviation, as a share of what rounding may make."""
    shares = {layer: error / tolerance[layer] for layer, error in errors.items()}
    worst = max(shares, key=lambda layer: shares[layer], default=None)
    value = shares[worst] if worst is not None else 0.0
    wrong = [layer for layer, share in shares.items() if not share <= 1.0]
    said = f"each of {len(shares)} layers computes what its reference does on the same input"
    if wrong:
        said = f"layer {worst} is off by {errors[str(worst)]:.1e} of its largest output on the same input"
        said += f" ({len(wrong)} layers in all)" if len(wrong) > 1 else ""
    return GateCheck("layers", value, 1.0, (value, value), "fail" if wrong else "pass", said)


def _more(images: int | None) -> str:
    return f": undecided, use at least {images} images" if images else ": undecided, a million images would not decide"
