"""What the images show: engine, reference and float on each of them, and the engine's time beside float's.

Comes after integrity and before verdicts; decisions are kept per image, since everything else is paired on them.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibrators.images import ImageSet
from dfq_deploy.evaluate import Check, evaluate
from dfq_deploy.gating.baseline import hashed
from dfq_deploy.gating.integrity import OpenBundle
from dfq_deploy.gating.result import Mode
from dfq_deploy.gating.speed import time_ratio
from dfq_deploy.opening import engine_again, float_model_in
from dfq_deploy.statistics import Interval, Paired
from dfq_deploy.watch import Watch, counting

__all__ = ["Seen", "look"]


@dataclass(frozen=True)
class Seen:
    """What the images showed.

    Attributes:
        found: Engine, reference and float compared.
        ran: Whether it was the engine that ran, not a stand-in.
        labels: The labels, if there are any.
        hashes: Of the images, in order.
        decisions: Classes (n,) of `float`, `reference`, `engine` and `moved`: the reference with its input moved; none
            where the task has no one class for an image.
        time: The engine's time over float's and its interval; None where it was not taken.
        untimed: Why it was not taken.
    """

    found: Check
    ran: bool
    labels: np.ndarray | None
    hashes: list[str]
    decisions: Mapping[str, np.ndarray]
    time: tuple[float, Interval] | None
    untimed: str

    @property
    def mode(self) -> Mode:
        """Whether accuracy was measured."""
        return "synthetic" if self.labels is None else "labels"

    @property
    def against_float(self) -> Paired | None:
        """Where float and the engine are right; without labels, where reference and engine decide as float does.

        None where there are no decisions.
        """
        if not self.decisions:
            return None
        if self.labels is not None:
            return Paired.of(self.decisions["float"] == self.labels, self.decisions["engine"] == self.labels)
        return Paired.of(*(self.decisions[name] == self.decisions["float"] for name in ("moved", "engine")))


def look(bundle: OpenBundle, images: ImageSet, *, timed: bool, watch: Watch) -> Seen:
    """Run everything on `images`, and the engine and float in turn where it is to be `timed`."""
    watch.stage("images", False)
    manifest = bundle.manifest
    decisions: dict[str, np.ndarray] = {}
    marked, hashes = hashed(images)
    engine, quantized, absent = engine_again(bundle.folder, manifest)
    with contextlib.closing(engine):
        found = evaluate(
            bundle.reference,
            engine,
            marked,
            quantized=quantized,
            facts=manifest.engine,
            absent=absent,
            progress=counting(watch),
            see=decisions.update,
        )
        floats = float_model_in(bundle.folder)
        untimed = _why_untimed(manifest.backend, floats, absent)
        time = None
        if timed and floats is not None and not untimed:
            watch.stage("latency", False)
            time = time_ratio(engine, floats, manifest)
    if decisions:
        decisions["moved"] = decisions["moved"][0]
    return Seen(
        found=found,
        ran=absent is None,
        labels=images.labels,
        hashes=[hashes[number] for number in range(len(images))],
        decisions=decisions,
        time=time,
        untimed=untimed,
    )


def _why_untimed(backend: str, floats: Path | None, absent: str | None) -> str:
    """Why the engine's time cannot be held against float's; empty where it can."""
    if absent is not None:
        return "the engine cannot run here"
    if backend != "ort":
        return "only ONNX Runtime runs the float model as it runs the engine"
    if floats is None:
        return "there is no float model beside the bundle: export with --keep-float, or keep its work folder"
    return ""
