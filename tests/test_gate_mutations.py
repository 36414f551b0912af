"""Bundles that drifted: which of them a gate fails, with labels and without, and which it lets through.

What is let through is named here, so this is the list of what the gate is known to miss. The rates are told at the end
of the run.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import dfq_deploy as dfq
from dfq_deploy.gating.result import GateResult
from tests.mutations import MUTATIONS

_DIGITS = Path(dfq.__file__).parent / "models" / "demo" / "held_back.npz"
_LIMITS = dfq.GateLimits(max_drop=2.0)  # of 360 digits one that is lost leaves 1.56 points open
_SAW = {"layers", "engine_reference", "drop", "agreement"}  # the checks that see what was run, not what is stored
_UNSEEN = {"an input's scale x 1.3, in the plan too", "an input's scale x 30, in the plan too"}  # by what decides alone
_SLIGHT = {
    "GELU approximated by tanh"
}  # a hundredth of what quantization changes: caught or not, as the images have it


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that is as it should be. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("gate") / "bundle"
    dfq.export(dfq.Recipe(model="demo", generator="noise", count=32, refine="none"), folder, limit=1)
    return folder


def _gate(bundle: Path, mode: str, limit: int | None = None) -> GateResult:
    return dfq.gate(bundle, _LIMITS, images=f"npz:{_DIGITS}" if mode == "labels" else None, limit=limit)


@pytest.mark.parametrize("mode", ["labels", "synthetic"])
def test_what_did_not_drift_passes(good: Path, mode: str) -> None:
    found = _gate(good, mode)
    assert (found.verdict, found.mode) == ("pass", mode)


@pytest.mark.parametrize("mode", ["labels", "synthetic"])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_drifted_fails_on_few_images(
    good: Path, tmp_path: Path, mutation: str, mode: str, record_property: Callable[[str, object], None]
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(good, bundle)
    MUTATIONS[mutation](bundle)
    failed = {check.name for check in _gate(bundle, mode, 48).checks if check.verdict == "fail"}
    record_property("gate mutation", (mutation, mode, bool(failed), bool(failed & _SAW)))
    if mutation in _SLIGHT:
        assert failed <= {"engine_reference"}
    else:
        assert bool(failed) == (mutation not in _UNSEEN), failed


def test_a_plan_that_became_much_worse_fails_against_a_baseline_a_little_worse_does_not(
    good: Path, tmp_path: Path
) -> None:
    baseline = tmp_path / "baseline.json"
    assert dfq.gate(good, _LIMITS, baseline=baseline, update=True).verdict == "pass"
    for mutation, failed in zip(sorted(_UNSEEN), ([], ["baseline_sqnr"]), strict=True):
        bundle = tmp_path / mutation
        shutil.copytree(good, bundle)
        MUTATIONS[mutation](bundle)
        found = dfq.gate(bundle, dfq.GateLimits(latency_band=1e6), baseline=baseline)
        assert [check.name for check in found.checks if check.verdict == "fail"] == failed
        (belongs,) = (check for check in found.checks if check.name == "baseline")
        assert belongs.reason == "it knows 32 of 32 images; plan changed since"
