"""What a report measures itself: time, and, where nobody did so before, which layers hurt and how images calibrate.

Time is measured anew for each report, the engines called in turn. The rest is kept in the run folder's `work`, under a
fingerprint of what it depends on.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from calibrators.errors import BundleError, RecipeError
from calibrators.files import write_json
from dfq_deploy.auditing import audit_against_noise
from dfq_deploy.building import made_with
from dfq_deploy.layer_costs import sensitivity
from dfq_deploy.models import Model
from dfq_deploy.opening import float_model_in
from dfq_deploy.reporting.checked import Audited, Interval, Sensed, read_audit, read_audit_of, read_sensitivity
from dfq_deploy.runtime import load
from dfq_deploy.watch import Watch
from dfq_deploy.workspace import Workspace
from exporters.bundle import Manifest
from exporters.ort_engine import OrtEngine
from exporters.turns import median_ratio, seconds_in_turn

__all__ = ["FLOAT", "Latency", "audited", "measure_latency", "sensitivities"]

FLOAT = "float"
_BATCHES = (1, 8)
_IMAGES = 8  # that tell how much each layer hurts
_WARM_UP, _MOST = 2, 60  # calls of each engine
_SECONDS = 6.0  # per size of batch


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
        floats = next(filter(None, map(float_model_in, folders.values())), None)
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
    times = seconds_in_turn(calls, seconds=_SECONDS, most=_MOST, warm_up=_WARM_UP)
    taken = dict(zip(engines, times.T, strict=True))
    quartiles = {name: 1000 * np.percentile(own, (50, 25, 75)) for name, own in taken.items()}
    return Latency(
        batch=batch,
        milliseconds={name: Interval(*ends.tolist()) for name, ends in quartiles.items()},
        ratios={
            name: Interval(*median_ratio(taken[FLOAT], own))
            for name, own in taken.items()
            if name != FLOAT and FLOAT in taken
        },
        calls=len(times),
    )


def sensitivities(
    folder: Path, manifest: Manifest, *, checkpoint: Path | None, model: Model | None, quick: bool, watch: Watch
) -> Sensed:
    """What quantizing each layer of the bundle in `folder` costs; see `dfq_deploy.analysis.Sensitivity`.

    Raises:
        DeployError: It cannot be had.
    """

    def make(path: Path) -> None:
        _refuse(quick, "sensitivity")
        sensitivity(folder, limit=_IMAGES, checkpoint=checkpoint, model=model, watch=watch).save(path)

    return read_sensitivity(_kept(folder, manifest, "sensitivity", make, watch))


def audited(
    folder: Path, manifest: Manifest, *, checkpoint: Path | None, model: Model | None, quick: bool, watch: Watch
) -> Audited:
    """The audit in `folder/audit`, else one of the calibration images against noise.

    Raises:
        DeployError: It cannot be had.
    """
    if (folder / "audit" / "audit.json").is_file():
        return read_audit_of(folder, manifest)

    def make(path: Path) -> None:
        _refuse(quick, "audit")
        report = audit_against_noise(folder, checkpoint=checkpoint, model=model, watch=watch).report()
        write_json(path, report)

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
