"""Transform: channels with large activations are centred and divided by more, and what reads them makes up for it.

One scale per tensor then serves all channels better. How far to go is searched: whether to centre, and the exponent
with which quantizing both the activation and the weights changes the readers' outputs least.

Source: Xiao et al., "SmoothQuant", arXiv 2211.10438, eq. 4: factor = max|X|^a / max|W|^(1 - a) per channel, after the
middle of the channel's range is taken off, as in Wei et al., "Outlier Suppression+", arXiv 2304.09145. There
`a` is set by hand for the whole model; here it is searched per fold, and the activation is given a range `HEADROOM`
times what was seen, since real images reach further than synthetic ones. For the same reason max|X| in front of
attention's projection is that of V, not of the averages of it that arrive. Where only weights are quantized nothing is
taken off, and the factor is mean|X|^a, as in Lin et al., "AWQ", arXiv 2306.00978, sec. 3.2: weights of channels that
count get finer steps.
"""

import torch
from torch import Tensor

from calibrators.affine import choose_qparams
from calibrators.plan import QParams
from calibrators.refine import HEADROOM, Seen
from calibrators.sites import rounded

__all__ = ["transform"]

_EXPONENTS = (0.0, 0.25, 0.4, 0.5, 0.6, 0.7)  # beyond, channels are cut off that real images drive further
_TINY = 1e-6  # of the largest: a channel that is always zero needs no factor


def transform(seen: Seen) -> tuple[Tensor, Tensor]:
    """The offsets and factors with the least error of the readers' outputs."""
    none = torch.zeros_like(seen.low)
    centres = (none,) if seen.activation is None else (none, (seen.low + seen.high) / 2)
    tried = [(offsets, _factors(seen, offsets, exponent)) for offsets in centres for exponent in _EXPONENTS]
    errors = [_error(seen, *one) for one in tried]
    return tried[errors.index(min(errors))]


def _factors(seen: Seen, offsets: Tensor, exponent: float) -> Tensor:
    """Factors whose geometric mean is 1."""
    weights = _positive(seen.readers.abs().amax(0))
    if seen.activation is None:
        factors = _positive(seen.rows.abs().mean(0)) ** exponent
    else:
        reach = torch.maximum(offsets - seen.low, seen.high - offsets)
        factors = _positive(reach) ** exponent / weights ** (1 - exponent)
        if exponent == 0:
            factors = torch.ones_like(factors)
    return factors / factors.log().mean().exp()


def _error(seen: Seen, offsets: Tensor, factors: Tensor) -> float:
    """Power of what quantizing all changes in what the readers put out."""
    rows, weights = (seen.rows - offsets) / factors, seen.readers * factors
    wanted = rows @ weights.T
    if seen.activation is not None:
        low, high = ((end - offsets) / factors for end in (seen.low, seen.high))
        ends = (low.amin() * HEADROOM).numpy(), (high.amax() * HEADROOM).numpy()
        rows = rounded(rows, QParams(*choose_qparams(*ends, seen.activation), seen.activation, None))
    groups = weights.reshape(-1, seen.block or weights.shape[1])
    scales = choose_qparams(groups.amin(1).numpy(), groups.amax(1).numpy(), seen.weight)
    rounded_weights = rounded(groups, QParams(*scales, seen.weight, 0)).reshape(weights.shape)
    return float((rows @ rounded_weights.T - wanted).square().sum())


def _positive(values: Tensor) -> Tensor:
    return values.clamp(min=_TINY * float(values.amax()) or 1.0)
