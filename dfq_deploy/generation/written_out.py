"""Attention written out: two matmuls and a softmax in place of the fused kernel, where that is the slower one.

On a CPU the backward pass of PyTorch's fused attention takes two to three times as long as that of its parts, and up to
a third of a whole step of synthesis. A model is not touched: calls are replaced while the block runs.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["attention_written_out"]


def attention_written_out(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A block in which models on `device` compute attention in the form that is fastest with gradients."""
    return _WrittenOut() if device.type == "cpu" else contextlib.nullcontext()


class _WrittenOut(TorchFunctionMode):
    """Computes `scaled_dot_product_attention` from its parts, where there is no more to it than a mask."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and not (kwargs.get("is_causal") or kwargs.get("enable_gqa")):
            return _attention(*args, **kwargs)
        return function(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """softmax(Q·Kᵀ·scale + mask)·V."""
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ value
