"""Correction: weights are rounded one input channel after the other; the channels still to come make up for the errors.

What comes out lies on its codes already.

Source: Frantar et al., "GPTQ", arXiv 2210.17323, algorithm 1 with the columns in the order of their Hessian's diagonal.
Scales are set beforehand and stay. Three things are ours. Inputs are those of the quantized model. Each token counts
by how much it matters. And the Hessian's entries off the diagonal are taken times a half, and less where tokens are
few: full ones fit synthetic images so well that real ones fare worse than with plain rounding.
"""

import warnings

import torch
from torch import Tensor

from calibrators.affine import fake_quantize
from calibrators.errors import CalibrationWarning
from calibrators.refine import Layer

__all__ = ["correct"]

_OFF_DIAGONAL = 0.5
_DAMPING = 0.01  # of the mean of the diagonal, as in the paper
_COLUMNS = 64  # whose corrections are gathered before the rest of the weight takes them


def correct(layer: Layer) -> None:
    """Set the weight."""
    tokens, width = layer.arriving.shape
    if tokens < width:
        warnings.warn(
            f"{layer.name}: {tokens} tokens of {layer.images} images are few for {width} input channels: gptq hardly "
            "departs from plain rounding there.",
            CalibrationWarning,
            stacklevel=2,
        )
    layer.weight = _rounded(layer, *_spread(layer))


def _spread(layer: Layer) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the Hessian's inverse, and the order of columns that it is in."""
    tokens, width = layer.arriving.shape
    inputs = layer.weighed.double()
    hessian = inputs.T @ inputs
    del inputs  # for a layer of 5120 inputs each matrix takes 210 MB
    diagonal = hessian.diagonal().clone()
    hessian *= _OFF_DIAGONAL * tokens / (tokens + width)
    hessian.diagonal().copy_(diagonal + (_DAMPING * float(diagonal.mean()) or 1.0))
    order = diagonal.argsort(descending=True)
    hessian = hessian[order[:, None], order]
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True), order


def _rounded(layer: Layer, spread: Tensor, order: Tensor) -> Tensor:
    """The weight on its codes."""
    scale, zero = (torch.from_numpy(part).expand_as(layer.weight)[:, order].double() for part in layer.qparams.along(2))
    weight = layer.weight[:, order].double()
    for start in range(0, weight.shape[1], _COLUMNS):
        columns = range(start, min(start + _COLUMNS, weight.shape[1]))
        errors = torch.empty(len(weight), len(columns), dtype=weight.dtype)
        for place, column in enumerate(columns):
            value = weight[:, column].clone()
            weight[:, column] = fake_quantize(value, scale[:, column], zero[:, column], layer.qparams.codes)
            errors[:, place] = (value - weight[:, column]) / spread[column, column]
            rest = slice(column + 1, columns.stop)
            weight[:, rest] -= errors[:, place, None] * spread[column, rest]
        weight[:, columns.stop :] -= errors @ spread[start : columns.stop, columns.stop :]
    found = torch.empty_like(weight)
    found[:, order] = weight
    return found.float()
