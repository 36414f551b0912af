"""The torch model watched while images pass: what every collector starts from.

All sites at once, one walk over the images. The model is put into `observe`, each batch runs once, and the observers'
answers become ranges. Memory holds one batch and one observer per site, whatever the number of images.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from calibrators.collectors import Subject
from calibrators.errors import PlanError
from calibrators.images import ImageSet
from calibrators.observers import MinMax, Observer
from calibrators.plan import SiteRange
from calibrators.sites import Mode, set_mode, sites_of
from calibrators.tensors import tensors_of

__all__ = ["observed", "observed_for"]


def observed(
    module: nn.Module,
    images: ImageSet,
    observer: Callable[[], Observer],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> dict[str, SiteRange]:
    """Ranges, in float32, of every site of `module` that `images` reach.

    Args:
        module: A model with sites, in evaluation mode.
        images: Calibration images.
        observer: Makes the observer of one activation site; weights are watched by per-channel MinMax.
        batch_size: Images per forward pass.
        progress: Called with images done and in all.

    Raises:
        PlanError: NaN or Inf passed a site; the message names it.
    """
    set_mode(module, Mode.OBSERVE, observer=observer)
    device = next(module.parameters()).device
    try:
        done = 0
        with torch.inference_mode():
            for batch in images.batches(batch_size):
                module(torch.from_numpy(batch).to(device))
                done += len(batch)
                progress(done, len(images))
        seen = {}
        for name, site in sites_of(module).items():
            if site.shape is None or site.observer is None:
                continue
            low, high = _range_of(name, site.observer)
            if site.fixed is not None:
                low, high = (np.float32(end) + np.zeros_like(low) for end in site.fixed)
            seen[name] = SiteRange(low, high, site.role, site.axis, site.shape[1:] if site.axis is None else site.shape)
    finally:
        set_mode(module, Mode.OFF)
    return seen


def observed_for(
    subject: Subject, images: ImageSet, progress: Callable[[int, int], object]
) -> tuple[dict[str, SiteRange], dict[str, str]]:
    """What a collector that runs the ONNX model starts from: minmax ranges, and the tensors whose ranges it replaces.

    The torch model sees the images first: it refuses NaN, gives the ranges of weights and knows which are fixed.

    Args:
        subject: A model with its ONNX form.
        images: Calibration images.
        progress: Called with images done and in all, which is twice their number: the collector does the other half.

    Raises:
        PlanError: NaN or Inf passed a site, or the ONNX model is another one.
    """
    assert subject.onnx is not None
    seen = observed(subject.module, images, MinMax, progress=lambda done, _: progress(done, 2 * len(images)))
    free = [name for name, site in sites_of(subject.module).items() if name in seen and site.fixed is None]
    return seen, tensors_of(free, subject.onnx)


def _range_of(name: str, observer: Observer) -> tuple[np.ndarray, np.ndarray]:
    try:
        return observer.range()
    except PlanError as cause:
        raise PlanError(what=f"site `{name}`: {cause.what}", why=cause.why, fix=cause.fix) from cause
