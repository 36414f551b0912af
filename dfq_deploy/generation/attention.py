"""Attention rows: how strongly patches are attended to, in any timm attention, fused or not.

Fused attention never shows softmax(Q·Kᵀ). Here the calls of `scaled_dot_product_attention` and of `softmax` are watched
where an attention makes them, with whatever norm, rotation, scale, position bias or mask the model has applied, and the
rows that a recipe asks for are computed again from Q and K. No loss and no schedule here.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from calibrators.errors import ImagesError
from dfq_deploy.generation.discovery import SOFTMAX
from dfq_deploy.generation.taps import AttentionTap, probe
from dfq_deploy.models import Model

__all__ = ["AttentionRows", "rows_of", "taps_with_rows"]

_Rows = Callable[[slice], Tensor]


class AttentionRows:
    """The rows of the last forward pass.

    A class token's row says how strongly it attends to each patch; where there is none among the attention's tokens,
    the mean over the queries says how strongly each patch is attended to.
    """

    def __init__(self, seen: Mapping[str, _Rows]) -> None:
        self._seen = seen

    def of(self, tap: AttentionTap) -> Tensor:
        """Attention to the patches, (B, windows, heads, tokens) float32; what a row gives to prefix tokens is left out.

        It carries a gradient.
        """
        queries = slice(0, 1) if tap.class_token else slice(tap.prefix, None)
        rows = self._seen[tap.name](queries).mean(-2)[..., tap.prefix :]
        return rows.reshape(-1, tap.windows, *rows.shape[1:])

    def shows(self, tap: AttentionTap) -> bool:
        """Whether the last forward pass showed an attention between the tap's tokens."""
        if tap.name not in self._seen:
            return False
        tokens = tap.prefix + tap.tokens
        return self._seen[tap.name](slice(0, 1)).shape[1:] == (tap.heads, 1, tokens)


@contextlib.contextmanager
def rows_of(taps: Sequence[AttentionTap]) -> Iterator[AttentionRows]:
    """The attention rows of `taps`, renewed by each forward pass within the block."""
    watch = _Watch()
    with contextlib.ExitStack() as exits:
        for tap in taps:
            for handle in (
                tap.attention.register_forward_pre_hook(functools.partial(watch.enter, tap.name)),
                tap.attention.register_forward_hook(watch.leave, always_call=True),
            ):
                exits.callback(handle.remove)
        exits.enter_context(watch)
        yield AttentionRows(watch.seen)


def taps_with_rows(model: Model, taps: Sequence[AttentionTap]) -> list[AttentionTap]:
    """Those of `taps` whose attention is between tokens.

    Raises:
        ImagesError: None is; attention between channels (XCiT's) is not.
    """
    with torch.no_grad(), rows_of(taps) as rows:
        model.module(probe(model))
        found = [tap for tap in taps if rows.shows(tap)]
    if not found:
        raise ImagesError(
            what=f"`{model.name}` shows no attention from token to token.",
            why="this recipe shapes softmax(Q·Kᵀ) of patches, and the model computes none.",
            fix="use the generator `dfq` or `dead_leaves`, or real images.",
        )
    return found


class _Watch(TorchFunctionMode):
    """Keeps, per attention at work, what its rows can be computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, _Rows] = {}
        self._at_work: str | None = None

    def enter(self, name: str, *_call: object) -> None:
        self._at_work = name

    def leave(self, *_call: object) -> None:
        self._at_work = None

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if self._at_work is not None:
            if function is F.scaled_dot_product_attention:
                self.seen[self._at_work] = _fused(*args, **(kwargs or {}))
            elif function in SOFTMAX and result.ndim == 4:
                self.seen[self._at_work] = functools.partial(_plain, result)
        return result


def _plain(attention: Tensor, queries: slice) -> Tensor:
    return attention[..., queries, :].float()


def _fused(
    query: Tensor, key: Tensor, _value: Tensor, attn_mask: Tensor | None = None, *_: Any, **options: Any
) -> _Rows:
    """Rows of softmax(Q·Kᵀ·scale + mask), by the arguments of `scaled_dot_product_attention`; none is causal here."""
    scale = options.get("scale") or query.shape[-1] ** -0.5

    def rows(queries: slice) -> Tensor:
        scores = scale * query[..., queries, :].float() @ key.float().transpose(-2, -1)
        if attn_mask is not None:
            mask = attn_mask if attn_mask.shape[-2] == 1 else attn_mask[..., queries, :]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        attention: Tensor = scores.softmax(-1)
        return attention

    return rows
