"""Transform: every channel of an activation gets the same range, centred on zero.

One scale per tensor then does what a scale and a zero-point per channel would; the weights that read the activation
pay for it. The offset alone makes a one-sided activation symmetric.

Source: Li et al., "RepQ-ViT", arXiv 2212.08254, sec. 3.2, eqs. 9 to 12. There the ranges of the channels are
percentiles chosen by their squared error and the LayerNorm's output keeps a zero-point of its own; here they are the
smallest and largest values, and the offset is the middle of the range, so that symmetric formats serve as well.
"""

import torch
from torch import Tensor

from calibrators.refine import Seen

__all__ = ["transform"]

_TINY = 1e-3  # of the mean width: a channel that hardly varies would blow up its weights


def transform(seen: Seen) -> tuple[Tensor, Tensor]:
    """The middle of each channel's range, and its width relative to the mean width."""
    width = seen.high - seen.low
    mean = float(width.mean()) or 1.0
    return (seen.low + seen.high) / 2, torch.clamp(width / mean, min=_TINY)
