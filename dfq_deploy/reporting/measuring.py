"""What a report measures itself: time, and, where nobody did so before, which layers hurt and how images calibrate.

Time is measured anew for each report, the engines called in turn. The rest is kept in the run folder's `work`, under a
fingerprint of what it depends on.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from scipy import stats

from calibrators.errors import BundleError, RecipeError
from calibrators.files import written_whole
from dfq_deploy.auditing import audit_against_noise
from dfq_deploy.building import made_with
from dfq_deploy.layer_costs import sensitivity
from dfq_deploy.reporting.checked import Audited, Interval, Sensed, read_audit, read_sensitivity
from dfq_deploy.runtime import load
from dfq_deploy.watch import Watch
from dfq_deploy.workspace import Workspace
from exporters.backends.ort import OrtEngine
from exporters.bundle import Manifest
from exporters.turns import seconds_in_turn

__all__ = ["FLOAT", "Latency", "audited", "float_file", "measure_latency", "sensitivities"]

FLOAT = "float"
_BATCHES = (1, 8)
_IMAGES = 8  # that tell how much each layer hurts
_LEAST, _MOST = 7, 60  # calls of each engine
_SECONDS = 6.0  # that they may take, beyond the least


@dataclass(frozen=True)
class Latency:
    """How long calls take.

    Attributes:
        batch: Images per call.
        milliseconds: By engine the median, and the quartiles around it.
        ratios: By engine float's time over its own, call by call: the median with its 95 % interval. Empty without
            float.
        calls: Of each engine.
    """

    batch: int
    milliseconds: Mapping[str, Interval]
    ratios: Mapping[str, Interval]
    calls: int


def float_file(folder: Path) -> Path | None:
    """The float ONNX model of the bundle in `folder`; None where it was not kept."""
    kept = [folder / "float.onnx", *sorted((folder / "work").glob("float-*.onnx"))]
    return next((path for path in kept if path.is_file()), None)


def measure_latency(folders: Mapping[str, Path], manifest: Manifest, watch: Watch) -> list[Latency]:
    """Time the engines of bundles of one model and their float model, in turn; one entry per size of batch.

    Args:
        folders: The bundles, by the name under which they are shown.
        manifest: Of one of them.
        watch: Told how it goes.

    Raises:
        DeployError: An engine cannot run here.
    """
    watch.stage("time", False)
    with ExitStack() as stack:
        engines: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
        floats = next(filter(None, map(float_file, folders.values())), None)
        if floats is not None and manifest.backend == "ort" and manifest.engine.options.provider in ("", "cpu"):
            engine = OrtEngine(floats, "cpu")
            stack.callback(engine.close)
            engines[FLOAT] = engine
        for name, folder in folders.items():
            engines[name] = stack.enter_context(load(folder))
        largest = manifest.engine.options.batch[2]
        found = []
        batches = dict.fromkeys(min(size, largest) for size in _BATCHES)
        for batch in batches:
            found.append(_timed(engines, batch, manifest.preprocess.shape))
            watch.progress(len(found), len(batches), {})
    return found


def _timed(
    engines: Mapping[str, Callable[[np.ndarray], np.ndarray]], batch: int, shape: tuple[int, int, int]
) -> Latency:
    images = np.random.default_rng(0).normal(size=(batch, *shape)).astype(np.float32)
    calls = [partial(engine, images) for engine in engines.values()]
    once = seconds_in_turn(calls, rounds=1).sum()
    rounds = int(np.clip(_SECONDS / once, _LEAST, _MOST))
    taken = dict(zip(engines, 1000 * seconds_in_turn(calls, rounds=rounds, warm_up=0).T, strict=True))
    ratios = {name: _ratio(taken[FLOAT] / own) for name, own in taken.items() if name != FLOAT and FLOAT in taken}
    return Latency(
        batch=batch,
        milliseconds={name: Interval(*np.percentile(own, (50, 25, 75)).tolist()) for name, own in taken.items()},
        ratios=ratios,
        calls=rounds,
    )


def _ratio(values: np.ndarray) -> Interval:
    found = stats.bootstrap(
        (values,), np.median, method="percentile", n_resamples=2000, rng=np.random.default_rng(0)
    ).confidence_interval
    return Interval(float(np.median(values)), float(found.low), float(found.high))


def sensitivities(folder: Path, manifest: Manifest, *, checkpoint: Path | None, quick: bool, watch: Watch) -> Sensed:
    """What quantizing each layer of the bundle in `folder` costs; see `dfq_deploy.analysis.Sensitivity`.

    Raises:
        DeployError: It cannot be had.
    """

    def make(path: Path) -> None:
        _refuse(quick, "sensitivity")
        sensitivity(folder, limit=_IMAGES, checkpoint=checkpoint, watch=watch).save(path)

    return read_sensitivity(_kept(folder, manifest, "sensitivity", make, watch))


def audited(folder: Path, manifest: Manifest, *, checkpoint: Path | None, quick: bool, watch: Watch) -> Audited:
    """The audit in `folder/audit`, else one of the calibration images against noise.

    Raises:
        DeployError: It cannot be had.
    """
    if (folder / "audit" / "audit.json").is_file():
        return read_audit(folder / "audit" / "audit.json")

    def make(path: Path) -> None:
        _refuse(quick, "audit")
        report = audit_against_noise(folder, checkpoint=checkpoint, watch=watch).report()
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(report, indent=1), encoding="utf-8")

    return read_audit(_kept(folder, manifest, "audit", make, watch))


def _kept(folder: Path, manifest: Manifest, name: str, make: Callable[[Path], None], watch: Watch) -> Path:
    """The file with the result of `make`, made unless it is there."""
    if not (folder / "work").is_dir():
        raise BundleError(
            what=f"`{folder.name}/work` is not here.",
            why="it has the calibration images, and the weights that refine passes changed.",
            fix="run the report where the export ran.",
        )
    facts = [manifest.model.fingerprint, manifest.files, manifest.images, manifest.recipe, _IMAGES, made_with()]
    try:
        with Workspace(folder, watch.stage) as work:
            return work.stage(name, ".json", facts, make)
    except OSError as cause:
        raise BundleError(
            what=f"`{folder.name}/work` cannot be written to.", why=f"{cause}.", fix="check its permissions."
        ) from cause


def _refuse(quick: bool, what: str) -> None:
    if quick:
        raise RecipeError(what=f"no {what} was measured.", why="--quick leaves it out.", fix="leave --quick out.")
