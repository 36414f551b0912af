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
from calibrators.ranges import SiteRange
from calibrators.sites import Mode, QuantSite, set_mode, sites_of
from calibrators.tensors import tensors_of

__all__ = ["observed", "observed_for"]


def observed(
    module: nn.Module,
    images: ImageSet,
    observer: Callable[[str], Observer],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> dict[str, SiteRange]:
    """Ranges, in float32, of every site of `module` that `images` reach.

    Args:
        module: A model with sites, in evaluation mode.
        images: Calibration images.
        observer: Makes an activation site's observer, by name; weights are watched by per-channel MinMax.
        batch_size: Images per forward pass.
        progress: Called with images done and in all.

    Raises:
        PlanError: NaN or Inf passed a site; the message names it and the image.
    """
    set_mode(module, Mode.OBSERVE, observer=observer)
    sites = sites_of(module)
    device = next(module.parameters()).device
    try:
        done = 0
        with torch.inference_mode():
            for batch in images.batches(batch_size):
                module(torch.from_numpy(batch).to(device))
                for site in sites.values():
                    if site.broken is not None:
                        raise _not_finite(site, site.broken, images.source, range(done, done + len(batch)))
                done += len(batch)
                progress(done, len(images))
        seen = {}
        for name, site in sites.items():
            if site.shape is None or site.observer is None:
                continue
            fixed = site.fixed and tuple(np.array(end, np.float32) for end in site.fixed)
            low, high = fixed or site.observer.range()
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
    n = len(images)
    seen = observed(subject.module, images, lambda _: MinMax(), progress=lambda done, _: progress(done, 2 * n))
    free = [name for name, site in sites_of(subject.module).items() if name in seen and site.fixed is None]
    return seen, tensors_of(free, subject.onnx)


def _not_finite(site: QuantSite, row: int, source: str, images: range) -> PlanError:
    """What to raise after a batch of `images`, by index, with NaN or Inf in the row `row` of what passed `site`."""
    assert site.shape is not None
    # An image may have several rows, as it has in windows; the batch is outermost all the same.
    image = images[row * len(images) // site.shape[0]]
    where = "" if site.role == "weight" else f" for image {image} of {source}, counted from 0,"
    return PlanError(
        what=f"site `{site.name}`: the values{where} hold NaN or Inf.",
        why="the weights hold it." if site.role == "weight" else "the model puts it out.",
        fix="check the checkpoint and the images.",
    )
