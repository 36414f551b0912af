"""Patch similarity as a term of the loss, in its fast form: another subset of the patches in each step and block.

What PSAQ-ViT's recipe and our own have in common. The arithmetic is in `losses`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dfq_deploy.generation.engine import View
from dfq_deploy.generation.losses import patch_similarity_entropy
from dfq_deploy.generation.taps import AttentionTap

__all__ = ["Similarity", "averaged_over_heads"]

_PATCHES = 64  # that are looked at, per image, block and step


class Similarity:
    """Minus the entropies of the similarities between patches, added up over the blocks.

    About `_PATCHES` patches: some of the only window, or all of some windows.
    """

    def __init__(
        self, taps: Sequence[AttentionTap], steps: int, generator: torch.Generator, device: torch.device
    ) -> None:
        self._taps = taps
        self._subsets = [
            (
                _subsets(steps, tap.windows, math.ceil(_PATCHES / tap.tokens), generator).to(device),
                _subsets(steps, tap.tokens, _PATCHES, generator).to(device),
            )
            for tap in taps
        ]

    def __call__(self, view: View) -> Tensor:
        """The term's value, a scalar."""
        entropies = [
            patch_similarity_entropy(
                averaged_over_heads(tap, view), windows=windows[view.step], tokens=tokens[view.step]
            )
            for tap, (windows, tokens) in zip(self._taps, self._subsets, strict=True)
        ]
        return -torch.stack(entropies).sum()


def averaged_over_heads(tap: AttentionTap, view: View) -> Tensor:
    """What is compared: softmax·V averaged over the heads, (B, windows, tokens, head_dim)."""
    return tap.contexts(view.inputs).mean(3)


def _subsets(steps: int, available: int, wanted: int, generator: torch.Generator) -> Tensor:
    """For each step, `wanted` different numbers below `available`, or all of them: (steps, n) int64."""
    order = torch.rand((steps, available), generator=generator).argsort(1)
    return order[:, : min(wanted, available)]
