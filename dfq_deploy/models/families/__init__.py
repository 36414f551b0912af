"""Attention families: one file per attention module whose two matmuls can be quantized.

Sites of Linear and Conv2d layers need no family. A family file adds the operands of Q·Kᵀ and of softmax·V.
"""

from typing import Protocol

from torch import nn

__all__ = ["Family"]


class Family(Protocol):
    """What each module in this folder offers."""

    def attach_attention(self, module: nn.Module) -> None:
        """Give every attention of this family its four operand sites, in place."""
        ...
