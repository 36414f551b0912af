"""Transform: channels with large activations are divided by more, and the weights that read them multiplied.

One scale per tensor then serves all channels better. How far to go is searched: the exponent with which quantizing
both the activation and the weights changes the readers' outputs least.

Source: Xiao et al., "SmoothQuant", arXiv 2211.10438, eq. 4: factor = max|X|^a / max|W|^(1 - a) per channel. There `a`
is set by hand for the whole model; here it is searched per fold, and the activation is given a range `_HEADROOM` times
what was seen, since real images reach further than synthetic ones. For the same reason max|X| in front of attention's
projection is that of V, not of the averages of it that arrive. Where only weights are quantized the factor is
mean|X|^a, as in Lin et al., "AWQ", arXiv 2306.00978, sec. 3.2: weights of channels that count get finer steps.
"""

import torch
from torch import Tensor

from calibrators.affine import choose_qparams
from calibrators.plan import QParams
from calibrators.refine import Seen
from calibrators.sites import rounded

__all__ = ["transform"]

_EXPONENTS = (0.0, 0.25, 0.4, 0.5, 0.6, 0.7)  # beyond, channels are cut off that real images drive further
_HEADROOM = 1.3
_TINY = 1e-6  # of the largest: a channel that is always zero needs no factor


def transform(seen: Seen) -> tuple[Tensor, Tensor]:
    """No offsets, and the factors with the least error of the readers' outputs."""
    none = torch.zeros_like(seen.low)
    wanted = seen.rows @ seen.readers.T
    tried = [_factors(seen, exponent) for exponent in _EXPONENTS]
    errors = [float((_outputs(seen, factors) - wanted).square().sum()) for factors in tried]
    return none, tried[errors.index(min(errors))]


def _factors(seen: Seen, exponent: float) -> Tensor:
    """Factors whose geometric mean is 1."""
    weights = _positive(seen.readers.abs().amax(0))
    if seen.activation is None:
        factors = _positive(seen.rows.abs().mean(0)) ** exponent
    else:
        factors = _positive(torch.maximum(-seen.low, seen.high)) ** exponent / weights ** (1 - exponent)
        if exponent == 0:
            factors = torch.ones_like(factors)
    return factors / factors.log().mean().exp()


def _outputs(seen: Seen, factors: Tensor) -> Tensor:
    """What the readers put out when all is quantized."""
    rows, weights = seen.rows / factors, seen.readers * factors
    if seen.activation is not None:
        ends = ((seen.low / factors).amin() * _HEADROOM).numpy(), ((seen.high / factors).amax() * _HEADROOM).numpy()
        rows = rounded(rows, QParams(*choose_qparams(*ends, seen.activation), seen.activation, None))
    groups = weights.reshape(-1, seen.block or weights.shape[1])
    scales = choose_qparams(groups.amin(1).numpy(), groups.amax(1).numpy(), seen.weight)
    return rows @ rounded(groups, QParams(*scales, seen.weight, 0)).reshape(weights.shape).T


def _positive(values: Tensor) -> Tensor:
    return values.clamp(min=_TINY * float(values.amax()) or 1.0)
