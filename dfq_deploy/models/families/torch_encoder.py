"""torch's own encoder layer, whose fast path takes the weights of its Linear layers past their sites.

There are no operand sites: `nn.MultiheadAttention` stays float.
"""

from torch import nn

__all__ = ["attach_attention"]


def attach_attention(module: nn.Module) -> None:
    """Have every encoder layer run its Linear layers, in place."""
    for layer in module.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            layer.activation_relu_or_gelu = 0  # what torch asks before it takes the fast path
