"""Shifts and flips: how images are moved before the model sees them in a step of synthesis.

All moves are drawn before the first step, so that nothing is waited for in between.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moves"]


@dataclass(frozen=True)
class Moves:
    """Shift and flip of every step, as the order in which rows and columns are taken: each (steps, H or W) int64.

    A move is a permutation, so its gradient is the way back; indexed both ways, nothing is ever added up in an order
    that may change.
    """

    rows: Tensor
    columns: Tensor
    rows_back: Tensor
    columns_back: Tensor

    @classmethod
    def drawn(
        cls, stages: Sequence[tuple[int, int]], size: tuple[int, int], generator: torch.Generator, device: torch.device
    ) -> "Moves":
        """Per step, one offset for both axes and a flip of the whole batch in half of the cases.

        `stages` are runs of steps, each with its number of steps and the largest offset.
        """
        offsets = [torch.randint(-jitter, jitter + 1, (steps, 1), generator=generator) for steps, jitter in stages]
        offset = torch.cat(offsets)
        flip = torch.rand((len(offset), 1), generator=generator) < 0.5
        rows = (torch.arange(size[0]) - offset) % size[0]
        columns = (torch.arange(size[1]) - offset) % size[1]
        columns = torch.where(flip, columns.flip(1), columns)
        return cls(*(order.to(device) for order in (rows, columns, rows.argsort(1), columns.argsort(1))))

    def moved(self, pixels: Tensor, step: int) -> Tensor:
        """The images (B, C, H, W) as step number `step` shows them."""
        return pixels.index_select(2, self.rows[step]).index_select(3, self.columns[step])

    def moved_back(self, gradient: Tensor, step: int) -> Tensor:
        """The gradient of the images from the gradient of what was shown."""
        return gradient.index_select(2, self.rows_back[step]).index_select(3, self.columns_back[step])
