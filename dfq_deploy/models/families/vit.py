"""ViT and DeiT: global self-attention over all tokens (timm's `Attention`).

With no operand site at work the module computes as timm does, fused kernel included. With one at work the two
matmuls are written out, Q scaled before the first.
"""

from timm.layers.attention import Attention, maybe_add_mask, resolve_self_attn_mask
from torch import Tensor, nn

from calibrators.sites import OperandSites

__all__ = ["attach_attention"]


class SitedAttention(Attention):
    """timm's Attention with sites on the operands of its matmuls."""

    sites: OperandSites

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attended tokens, (B, N, C) to (B, N, C_out)."""
        if not self.sites.active:
            plain: Tensor = super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
            return plain
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each (B, heads, N, head_dim)
        q, k = self.q_norm(q) * self.scale, self.k_norm(k)
        scores = self.sites.qk_lhs(q) @ self.sites.qk_rhs(k.transpose(-2, -1))  # (B, heads, N, N)
        scores = maybe_add_mask(scores, resolve_self_attn_mask(tokens, scores, attn_mask, is_causal))
        context = self.sites.av_lhs(scores.softmax(dim=-1)) @ self.sites.av_rhs(v)
        context = self.norm(context.transpose(1, 2).reshape(batch, tokens, self.attn_dim))
        if self.gate is not None:
            context = context * self.gate(x).sigmoid()
        attended: Tensor = self.proj_drop(self.proj(context))
        return attended


def attach_attention(module: nn.Module) -> None:
    """Give every timm `Attention` its operand sites, in place."""
    for name, layer in list(module.named_modules()):
        if type(layer) is Attention:
            layer.__class__ = SitedAttention
            layer.sites = OperandSites(name)
