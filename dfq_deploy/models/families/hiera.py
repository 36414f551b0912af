"""Hiera, NesT and Twins: attention over tensors of five axes, the windows between batch and heads or after them.

torch's exporter has fused attention of four axes alone, so that here the matmuls are written out, as timm does where it
has no fused kernel. There are no operand sites: the matmuls of these families stay float.
"""

from timm.models import hiera, nest, twins
from torch import nn

__all__ = ["attach_attention"]

_KINDS = (hiera.MaskUnitAttention, nest.Attention, twins.LocallyGroupedAttn)


def attach_attention(module: nn.Module) -> None:
    """Have every attention of these families written out, in place."""
    for layer in module.modules():
        if isinstance(layer, _KINDS):
            layer.fused_attn = False
