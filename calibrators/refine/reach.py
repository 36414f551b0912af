"""Correction: the input's range, so that it serves images which were not seen.

What a LayerNorm or an attention puts out goes further on real images than on synthetic ones, and is hurt by being cut
off: its range is what was seen, and a little more. What a GELU or ReLU puts out is one-sided with a long thin tail,
and does not: its range is searched, and a part of the tail cut off where the layer's outputs err least.

Source: the search is that of Yuan et al., "PTQ4ViT", arXiv 2111.12293, sec. 3.3, with the squared error of the layer's
outputs, each token counted by how much it matters, in place of its Hessian-weighted form. The two kinds and `HEADROOM`
are ours, found on ViT-Ti and DeiT-Ti.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from calibrators.affine import choose_qparams
from calibrators.plan import QParams
from calibrators.refine import HEADROOM, Layer
from calibrators.sites import rounded

__all__ = ["correct"]

_ONE_SIDED = 0.25  # largest share of the longer side that the shorter side has
_SHARES = tuple(np.geomspace(0.25, 1.1, 32))
_TOKENS = 1024  # that the search computes with, drawn by how much they matter


def correct(layer: Layer) -> None:
    """Set the input's scale and zero-point, where the run-time does not find them anew."""
    given = layer.input_qparams
    if given is None or given.dynamic or given.codes.mantissa is not None:
        return
    low, high = (np.asarray(end, np.float32) for end in layer.arriving.aminmax())
    shares = _SHARES if min(-low, high) < _ONE_SIDED * max(-low, high) else (HEADROOM,)
    tried = [_covering(low * np.float32(share), high * np.float32(share), given) for share in shares]
    tokens = layer.arriving[_drawn(layer.importance)]
    errors = [_error(tokens, layer.weight, qparams) for qparams in tried]
    layer.input_qparams = tried[int(np.argmin(errors))]


def _covering(low: np.ndarray, high: np.ndarray, qparams: QParams) -> QParams:
    scale, zero = choose_qparams(low, high, qparams.codes)
    return replace(qparams, scale=scale, zero_point=zero)


def _drawn(importance: Tensor) -> Tensor:
    """Places of tokens, each as often as it matters: even steps through the sum of their weights."""
    reached = importance.double().cumsum(0)
    count = min(_TOKENS, len(importance))
    places = torch.searchsorted(reached, (torch.arange(count) + 0.5) / count * reached[-1])
    return places.clamp(max=len(importance) - 1)


def _error(tokens: Tensor, weight: Tensor, qparams: QParams) -> float:
    errors = (rounded(tokens, qparams) - tokens) @ weight.T
    return float(errors.square().sum())
