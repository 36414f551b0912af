"""The logits that an engine is judged by: its own, its reference's, float's, and the reference's with its input moved.

Images go through in batches, and what a batch gives depends on its images and its number alone: shards of whole batches
give, one behind the other, what all images give at once.
"""

from collections.abc import Callable

import numpy as np
import torch

from calibrators.images import Pixels
from dfq_deploy.reference import Reference
from exporters.backends import Engine
from exporters.census import Body

__all__ = ["AT_ONCE", "logits_of"]

AT_ONCE = 16
"""Images per batch."""
_MOVES = 3  # of the input, each another one; rounding to a body is the same each time
_SEED = 0


def logits_of(
    reference: Reference,
    engine: Engine,
    pixels: Pixels,
    body: Body,
    *,
    start: int = 0,
    stop: int | None = None,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> dict[str, np.ndarray]:
    """The logits that an engine is judged by; a batch's depend on its images and its number alone.

    Args:
        reference: The torch model under the plan that the engine was built from.
        engine: The loaded engine, or a stand-in.
        pixels: All images of the check.
        body: What the engine computes in what is not quantized.
        start: The first image to look at; it begins a batch.
        stop: The image to stop before. None: there is none.
        progress: Called with images done and in all.

    Returns:
        (n, classes) float32 of `float`, `reference` and `engine`, and (k, n, classes) of `moved`, k times.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("float", "reference", "engine", "moved")}
    moves = _MOVES if body == "fp32" else 1
    stop = len(pixels) if stop is None else stop
    for first in range(start, stop, AT_ONCE):
        batch = pixels[first : min(first + AT_ONCE, stop)]
        seed = np.random.SeedSequence((_SEED, first // AT_ONCE)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed[0]))
        parts["float"].append(reference.float(batch))
        parts["reference"].append(reference.quantized(batch))
        parts["moved"].append(np.stack([reference.moved(batch, generator, body) for _ in range(moves)]))
        parts["engine"].append(engine(batch))
        progress(first + len(batch) - start, stop - start)
    return {name: np.concatenate(part, axis=-2) for name, part in parts.items()}
