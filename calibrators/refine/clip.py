"""Correction: weight ranges that cut off a little, where the finer steps for the rest are worth it.

Each row or block of the weight gets the share of its range with the least error of the layer's outputs, channels
counted by the mean square of their input.

Source: the squared-error search of METHODS' "MSE clip" rows; the weighting is the diagonal of GPTQ's Hessian (Frantar
et al., "GPTQ", arXiv 2210.17323, sec. 3).
"""

from dataclasses import replace

import numpy as np
import torch

from calibrators.refine import Layer

__all__ = ["correct"]

_SHARES = tuple(np.linspace(0.6, 1.1, 26))


def correct(layer: Layer) -> None:
    """Set the weight's scales and zero-points."""
    power = layer.weighed.square().mean(0).expand_as(layer.weight).reshape(layer.groups.shape)
    rows = len(layer.groups)
    least = torch.full((rows,), torch.inf)
    best = torch.ones(rows)
    for share in _SHARES:
        tried = replace(layer)
        tried.cover(share)
        errors = ((tried.rounded() - layer.weight).reshape(layer.groups.shape).square() * power).sum(1)
        best = torch.where(errors < least, share, best)
        least = torch.minimum(errors, least)
    layer.cover(best)
