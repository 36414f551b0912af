"""Swin: self-attention within windows, with a relative position bias (timm's `WindowAttention`).

With no operand site at work the module computes as timm does. With one at work the two matmuls are written out,
Q scaled before the first.
"""

from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from calibrators.sites import OperandSites

__all__ = ["attach_attention"]


class SitedWindowAttention(WindowAttention):
    """timm's WindowAttention with sites on the operands of its matmuls."""

    sites: OperandSites

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attended tokens, (windows * B, N, C) to the same shape; `mask` is (windows, N, N)."""
        if not self.sites.active:
            plain: Tensor = super().forward(x, mask)
            return plain
        rows, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(rows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.sites.qk_lhs(q * self.scale) @ self.sites.qk_rhs(k.transpose(-2, -1))
        scores = scores + self._get_rel_pos_bias()  # (windows * B, heads, N, N)
        if mask is not None:
            windows = mask.shape[0]
            scores = scores.view(-1, windows, self.num_heads, tokens, tokens) + mask[None, :, None]
            scores = scores.view(-1, self.num_heads, tokens, tokens)
        context = self.sites.av_lhs(scores.softmax(dim=-1)) @ self.sites.av_rhs(v)
        attended: Tensor = self.proj_drop(self.proj(context.transpose(1, 2).reshape(rows, tokens, -1)))
        return attended


def attach_attention(module: nn.Module) -> None:
    """Give every timm `WindowAttention` its operand sites, in place."""
    for name, layer in list(module.named_modules()):
        if type(layer) is WindowAttention:
            layer.__class__ = SitedWindowAttention
            layer.sites = OperandSites(name)
