"""What a loop of image synthesis notes of each step: the terms of its loss, with no wait for the device in between.

Told of each step's terms and asked every few steps, it says how they go, stops a loop that broke down, and knows when
the loss has stopped falling.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from calibrators.errors import ImagesError

__all__ = ["Trace"]

_WINDOW = 20  # steps over which the loss is averaged to tell a plateau


class Trace:
    """Each term's value in each step, kept on the device until someone looks."""

    def __init__(self, names: Sequence[str], weights: Tensor, steps: int) -> None:
        self._names = names
        self._weights = weights.tolist()
        self._waiting = torch.empty(steps, len(names), device=weights.device)
        self._kept = 0
        self._rows: list[list[float]] = []

    @property
    def steps(self) -> int:
        """Steps that were looked at."""
        return len(self._rows)

    @property
    def rows(self) -> Tensor:
        """Each term (steps, T) in the steps that were looked at."""
        return torch.tensor(self._rows, dtype=self._waiting.dtype)

    @rows.setter
    def rows(self, rows: Tensor) -> None:
        self._rows = rows.tolist()
        self._kept = len(rows)

    def keep(self, values: Tensor) -> None:
        """Note the terms (T,) of the next step."""
        self._waiting[self._kept] = values
        self._kept += 1

    def look(self) -> dict[str, float]:
        """Mean of each term since the last look.

        Raises:
            ImagesError: One of them is not finite.
        """
        fresh = self._waiting[len(self._rows) : self._kept].tolist()
        for row in fresh:
            self._rows.append(row)
            for name, value in zip(self._names, row, strict=True):
                if not math.isfinite(value):
                    raise ImagesError(
                        what=f"synthesis broke down in step {len(self._rows)}: the term `{name}` is {value}.",
                        why="the model puts out NaN or Inf for these images, or the images left float32's range.",
                        fix="check the weights, try another --seed, or use the generator `noise`.",
                    )
        return dict(zip(self._names, np.mean(fresh, axis=0).tolist(), strict=True))

    def terms(self, step: int) -> dict[str, float]:
        """Each term in one step."""
        return dict(zip(self._names, self._rows[step], strict=True))

    def flat(self, cooling: int, share: float) -> bool:
        """Whether the loss stopped falling, as `Schedule.plateau` says, within the last `cooling` steps."""
        if cooling < 2 * _WINDOW:
            return False
        totals = np.asarray(self._rows) @ np.asarray(self._weights)
        before, now = totals[-2 * _WINDOW : -_WINDOW].mean(), totals[-_WINDOW:].mean()
        return bool(before - now <= share * (totals[0] - now))
