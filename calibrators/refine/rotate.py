"""Rotation: channels are mixed by a random orthogonal matrix, so that none is larger than the others.

One scale per tensor, or per row of a weight, then serves all of them. It matters where codes are few.

Source: Ashkboos et al., "QuaRot", arXiv 2404.00456, and "SliceGPT", arXiv 2401.15024, sec. 3. There LayerNorms become
RMSNorms, whose mean the weights before take off. Here the matrix keeps the direction in which all channels are alike,
which is all that a LayerNorm needs, so that no operator changes. What would have to be rotated while the model runs, as
GELU's outputs would, is left alone.
"""

import torch
from torch import Tensor

__all__ = ["rotate"]

_SEED = 0


def rotate(width: int) -> Tensor:
    """An orthogonal matrix, (width, width) float64, that maps (1, …, 1) to itself."""
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randn(2, width, width, generator=generator, dtype=torch.float64)
    drawn[0, :, 0] = 1
    basis = torch.linalg.qr(drawn[0]).Q  # its first column is the direction to keep
    mixed = torch.linalg.qr(drawn[1, 1:, 1:]).Q
    turned: Tensor = torch.outer(basis[:, 0], basis[:, 0]) + basis[:, 1:] @ mixed @ basis[:, 1:].T
    return turned
