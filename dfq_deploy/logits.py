"""What an engine is judged by: its own logits, its reference's, float's, and the reference's with its input moved.

Of a model that is no classifier it is all that is put out, its outputs side by side. Images go through in batches, and
what a batch gives depends on its images, its number and how many images there are: shards of whole batches give, one
behind the other, what all images give at once.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from calibrators.images import Pixels
from dfq_deploy.reference import Reference
from exporters.backends import Engine
from exporters.census import Body

__all__ = ["images_at_once", "logits_by_batch"]

_MOST = 2**25  # numbers that a batch puts out, where an image does not put out more
_MOVES = 3  # of each input at most, each another one; rounding to a body is the same each time
_MOVED = 1000  # inputs are enough: so many images need one move each
_SEED = 0


def images_at_once(numbers: int) -> int:
    """How many images a batch has where each puts out so many numbers: a power of two, 16 at most."""
    return next(n for n in (16, 8, 4, 2, 1) if n * numbers <= _MOST or n == 1)


def logits_by_batch(
    reference: Reference,
    engine: Engine,
    pixels: Pixels,
    body: Body,
    *,
    start: int = 0,
    stop: int | None = None,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> Iterator[dict[str, np.ndarray]]:
    """The logits that an engine is judged by, batch by batch, computed alike wherever its batch is.

    Args:
        reference: The torch model under the plan that the engine was built from.
        engine: The loaded engine, or a stand-in.
        pixels: All images of the check.
        body: What the engine computes in what is not quantized.
        start: The first image to look at; it begins a batch.
        stop: The image to stop before. None: there is none.
        progress: Called with images done and in all.

    Yields:
        (n, numbers) float32 of `float`, `reference` and `engine`, and (k, n, numbers) of `moved`, k times.
    """
    size = images_at_once(reference.model.numbers)
    moves = min(_MOVES, math.ceil(_MOVED / len(pixels))) if body == "fp32" else 1
    stop = len(pixels) if stop is None else stop
    for first in range(start, stop, size):
        batch = pixels[first : min(first + size, stop)]
        seed = np.random.SeedSequence((_SEED, first // size)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed[0]))
        yield {
            "float": reference.float(batch),
            "reference": reference.quantized(batch),
            "moved": np.stack([reference.moved(batch, generator, body) for _ in range(moves)]),
            "engine": engine(batch),
        }
        progress(first + len(batch) - start, stop - start)
