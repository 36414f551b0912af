"""How long the engine takes for one image against float.

A time says nothing beside one from another machine or another hour, so both models are called in turn here and what
counts is the ratio of each pair of calls.
"""

import contextlib
from pathlib import Path

import numpy as np

from calibrators.registry import pick
from dfq_deploy.statistics import Interval
from exporters.backends import Engine
from exporters.bundle import Manifest
from exporters.turns import median_ratio, seconds_in_turn

__all__ = ["time_ratio"]

_PAIRS = 40
_WARM_UP = 5


def time_ratio(engine: Engine, floats: Path, manifest: Manifest) -> tuple[float, Interval]:
    """Median of the engine's time over the float model's, call by call with one image, with its 95 % interval."""
    image = np.random.default_rng(0).normal(size=(1, *manifest.preprocess.shape)).astype(np.float32)
    facts = manifest.engine
    with contextlib.closing(
        pick("exporters.backends", manifest.backend).load(floats, facts.made_for, facts.options)
    ) as other:
        times = seconds_in_turn((lambda: engine(image), lambda: other(image)), rounds=_PAIRS, warm_up=_WARM_UP)
    ratio, *interval = median_ratio(times[:, 0], times[:, 1])
    return ratio, (interval[0], interval[1])
