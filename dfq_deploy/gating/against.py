"""The engine against its baseline: accuracy, decisions, size and time, paired per image where images are in both."""

import math
from collections.abc import Iterator

import numpy as np

from dfq_deploy.gating.baseline import Baseline
from dfq_deploy.gating.checks import band_check, drop_check, exact_check
from dfq_deploy.gating.integrity import OpenBundle
from dfq_deploy.gating.limits import GateLimits
from dfq_deploy.gating.result import GateCheck
from dfq_deploy.gating.seeing import Seen
from dfq_deploy.opening import engine_bytes
from dfq_deploy.statistics import Paired

__all__ = ["baseline_checks", "new_baseline"]

_MIB = 2.0**20
_SQNR_DB = 1.0  # what another machine's rounding changes over a whole set of images is a tenth of that


def new_baseline(bundle: OpenBundle, seen: Seen) -> Baseline:
    """The engine in `bundle` as a baseline."""
    manifest, found = bundle.manifest, seen.found
    decided = seen.decisions.get("engine", np.zeros(len(seen.hashes), np.int64))
    return Baseline(
        model=manifest.model.name,
        weights=manifest.model.fingerprint,
        plan=bundle.reference.plan.fingerprint,
        backend=manifest.backend,
        images=found.images,
        mode=seen.mode,
        n=found.n,
        top1=found.top1["engine"].percent if found.top1 else None,
        agreement=found.agreement["engine_float"].percent,
        sqnr_db=_sqnr(seen),
        size_bytes=engine_bytes(bundle.folder, manifest),
        latency_ratio=round(seen.time[0], 3) if seen.time else None,
        decisions=dict(zip(seen.hashes, decided.tolist(), strict=True)),
    )


def baseline_checks(
    baseline: Baseline, bundle: OpenBundle, *, seen: Seen, limits: GateLimits
) -> tuple[list[GateCheck], dict[str, str]]:
    """The checks against `baseline`, and those that could not be made with the reason."""
    before = baseline.of(seen.hashes)
    checks = [_belongs(baseline, bundle, known=int((before >= 0).sum()), of=len(before))]
    if checks[0].verdict == "fail":
        return checks, dict.fromkeys(("baseline_drop", "baseline_decisions", "size", "latency"), checks[0].reason)
    checks += [*(_paired(seen, before, limits) if seen.decisions else ()), _size(baseline, bundle, limits)]
    left_out = {} if seen.labels is not None else {"baseline_drop": "no labels"}
    if not seen.decisions:
        left_out["baseline_decisions"] = f"{bundle.model.task} has no one class for an image"
    if baseline.decisions.keys() == set(seen.hashes):
        checks.append(_sqnr_check(baseline.sqnr_db, _sqnr(seen)))
    else:
        left_out["baseline_sqnr"] = "it is that of other images"
    if seen.time is None or baseline.latency_ratio is None:
        left_out["latency"] = seen.untimed or "the baseline was written without it"
    else:
        checks.append(
            band_check(
                "latency",
                seen.time,
                baseline.latency_ratio,
                limits.latency_band,
                say=lambda ratio: f"{ratio:.3f} of float's time",
            )
        )
    return checks, left_out


def _belongs(baseline: Baseline, bundle: OpenBundle, *, known: int, of: int) -> GateCheck:
    """The baseline is of this model on this backend, and knows some of the images."""
    manifest = bundle.manifest
    wrong = [
        f"the baseline is of {was}, the bundle of {now}"
        for was, now in ((baseline.model, manifest.model.name), (baseline.backend, manifest.backend))
        if was != now
    ]
    if not known:
        wrong.append("the baseline knows none of the images: pass those that it was written with")
    changed = {
        "weights": baseline.weights != manifest.model.fingerprint,
        "plan": baseline.plan != bundle.reference.plan.fingerprint,
    }
    others = " and ".join(name for name, differs in changed.items() if differs)
    said = f"it knows {known} of {of} images; " + (f"{others} changed since" if others else "weights and plan are its")
    return exact_check("baseline", wrong, said)


def _paired(seen: Seen, before: np.ndarray, limits: GateLimits) -> Iterator[GateCheck]:
    """Accuracy, where there are labels, and decisions against those of the baseline, on the images that it knows."""
    known, now = before >= 0, seen.decisions["engine"]
    if seen.labels is not None:
        pair = Paired.of((before == seen.labels)[known], (now == seen.labels)[known])
        yield drop_check("baseline_drop", pair, limits.max_drop, said="lost against the baseline")
    changed, moved = (now != before)[known], (seen.decisions["moved"] != seen.decisions["reference"])[known]
    yield drop_check(
        "baseline_decisions",
        Paired.of(~moved, ~changed),
        # labels tell a loss from a change; without them images are few, and agreement is all there is
        limits.max_drop if seen.labels is not None else 100.0 - limits.min_agreement,
        said=f"of decisions changed since the baseline ({changed.sum()}) beyond what a move of the input that does not "
        f"matter changes ({moved.sum()})",
        two_sided=False,
    )


def _sqnr(seen: Seen) -> float | None:
    """Of the engine's logits against float's, in dB; None where it is not a number."""
    value = seen.found.sqnr_db["engine_float"]
    return value if math.isfinite(value) else None


def _sqnr_check(before: float | None, now: float | None) -> GateCheck:
    """How far the logits are from float's: sees a plan that became worse long before a decision does."""
    change = 0.0 if before == now else math.inf if before is None or now is None else now - before
    said = f"{now} dB to float, {before} in the baseline; {_SQNR_DB:g} dB either way allowed"
    if change > _SQNR_DB:
        said += ": an improvement; if it is meant, write the baseline anew with --update"
    within = abs(change) <= _SQNR_DB
    return GateCheck("baseline_sqnr", change, _SQNR_DB, (change, change), "pass" if within else "fail", said)


def _size(baseline: Baseline, bundle: OpenBundle, limits: GateLimits) -> GateCheck:
    size = engine_bytes(bundle.folder, bundle.manifest)
    return band_check(
        "size",
        (size, (size, size)),
        baseline.size_bytes,
        limits.size_band,
        say=lambda size: f"{size / _MIB:.2f} MiB",
    )
