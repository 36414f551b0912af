"""What a model puts out: named tensors, and the rows that they are side by side.

Whatever runs a model here gives one row per image: all its outputs, flattened, in the model's order. With one output
of one axis, a classifier's logits, the rows are that output itself. Rows can be compared, cut and joined with no
knowledge of what they hold; `parts_of` makes named tensors of them again. No torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, StringConstraints

__all__ = ["Output", "parts_of", "rows_of"]

_Edge = Annotated[int, Field(ge=1, lt=2**31)]


@dataclass(frozen=True)
class Output:
    """One tensor that a model puts out.

    Attributes:
        name: What it is called in ONNX and by a runner.
        shape: Its shape for one image.
    """

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*$")]
    shape: Annotated[tuple[_Edge, ...], Field(max_length=8)]

    @property
    def size(self) -> int:
        """How many numbers it has for one image."""
        return math.prod(self.shape)


def rows_of(found: Sequence[np.ndarray]) -> np.ndarray:
    """All outputs of a model, each (N, …), side by side: (N, numbers)."""
    flat = [part.reshape(len(part), -1) for part in found]
    return flat[0] if len(flat) == 1 else np.concatenate(flat, axis=1)


def parts_of(rows: np.ndarray, outputs: Sequence[Output]) -> dict[str, np.ndarray]:
    """The outputs by name, each (…, *shape), that (…, numbers) rows hold; they share the rows' memory if they can."""
    parts, start = {}, 0
    for output in outputs:
        cut = rows[..., start : start + output.size]
        parts[output.name] = cut.reshape(*rows.shape[:-1], *output.shape)
        start += output.size
    return parts
