"""BEiT, EVA and Swin v2: attention whose qkv layer has biases for q and v alone.

timm joins the biases with zeros for k and applies the layer's weight itself, so that the layer never runs and has
nothing to quantize. Here the joined bias becomes the layer's own, and the layer runs. There are no operand sites: the
matmuls of these families stay float.
"""

import torch
from timm.models import beit, eva, swin_transformer_v2
from torch import nn

__all__ = ["attach_attention"]

_KINDS = (beit.Attention, eva.EvaAttention, swin_transformer_v2.WindowAttention)


def attach_attention(module: nn.Module) -> None:
    """Give every qkv layer of these families its bias, in place."""
    for layer in module.modules():
        if isinstance(layer, _KINDS) and layer.qkv is not None and layer.q_bias is not None:
            joined = torch.cat((layer.q_bias, layer.k_bias, layer.v_bias)).detach()  # type: ignore[arg-type]
            layer.qkv.bias = nn.Parameter(joined, requires_grad=False)
            layer.q_bias = layer.v_bias = None  # type: ignore[assignment]
