"""How long the engine takes for one image against float, and how large it is.

A time says nothing beside one from another machine or another hour, so both models are called in turn here and what
counts is the ratio of each pair of calls.
"""

import contextlib
from pathlib import Path

import numpy as np
from scipy import stats

from calibrators.registry import pick
from dfq_deploy.gating.statistics import Interval
from exporters.backends import Engine
from exporters.bundle import Manifest
from exporters.turns import seconds_in_turn

__all__ = ["engine_bytes", "float_model_in", "time_ratio"]

_PAIRS = 40
_WARM_UP = 5
_SEED = 0


def engine_bytes(folder: Path, manifest: Manifest) -> int:
    """Size of what the run-time loads: the engine's own files, or `model.onnx` with its data."""
    names = manifest.engine.files or [name for name in manifest.files if name.startswith("model.onnx")]
    return sum((folder / name).stat().st_size for name in names)


def float_model_in(folder: Path) -> Path | None:
    """The float ONNX model that lies in the bundle or in its `work`; None where neither does."""
    found = [folder / "float.onnx", *sorted((folder / "work").glob("float-*.onnx"))]
    return next((path for path in found if path.is_file()), None)


def time_ratio(engine: Engine, floats: Path, manifest: Manifest) -> tuple[float, Interval]:
    """Median of the engine's time over the float model's, call by call with one image, with its 95 % interval."""
    image = np.random.default_rng(_SEED).normal(size=(1, *manifest.preprocess.shape)).astype(np.float32)
    facts = manifest.engine
    with contextlib.closing(
        pick("exporters.backends", manifest.backend).load(floats, facts.made_for, facts.options)
    ) as other:
        times = seconds_in_turn((lambda: engine(image), lambda: other(image)), rounds=_PAIRS, warm_up=_WARM_UP)
    ratios = times[:, 0] / times[:, 1]
    found = stats.bootstrap((ratios,), np.median, method="percentile", rng=np.random.default_rng(_SEED))
    ends = found.confidence_interval
    return float(np.median(ratios)), (float(ends.low), float(ends.high))
