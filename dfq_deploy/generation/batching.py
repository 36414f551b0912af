"""Batches: how an order of many images is divided, and what every synthetic set records about itself.

A batch's random numbers come from the order's seed and the batch's number alone, so any batch can be made alone, on any
machine, before or after the others. Nothing here knows what is made.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from calibrators.images import ImageSet
from dfq_deploy.generation import GenerateOptions, Progress
from dfq_deploy.generation.engine import Optimised
from dfq_deploy.models import Model

__all__ = ["BATCH", "batches", "in_batches", "optimised_set", "provenance"]

BATCH = 32  # images that are made together, at most

_Made = TypeVar("_Made")


def batches(options: GenerateOptions) -> Iterator[tuple[int, torch.Generator]]:
    """Size and random generator (on the CPU) of each batch, in order; only the last may be smaller than `BATCH`."""
    for number, start in enumerate(range(0, options.count, BATCH)):
        seed = np.random.SeedSequence((options.seed, number)).generate_state(1, np.uint64)
        yield min(BATCH, options.count - start), torch.Generator().manual_seed(int(seed[0]))


def in_batches(
    options: GenerateOptions, one_batch: Callable[[int, torch.Generator, Progress], _Made], progress: Progress
) -> list[_Made]:
    """What `one_batch` makes of each batch; `progress` is told of all of them as one."""
    shares = list(batches(options))
    return [
        one_batch(size, generator, functools.partial(_tell_share, progress, number, len(shares)))
        for number, (size, generator) in enumerate(shares)
    ]


def _tell_share(
    progress: Progress, number: int, shares: int, step: int, steps: int, terms: Mapping[str, float]
) -> None:
    progress(number * steps + step, shares * steps, terms)


def provenance(generator: str, model: Model, options: GenerateOptions) -> dict[str, Any]:
    """Facts for `ImageSet.made_by` that repeat a synthetic set."""
    return {
        "generator": generator,
        "count": options.count,
        "seed": options.seed,
        "exact": options.exact,
        "batch": BATCH,
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def optimised_set(generator: str, model: Model, options: GenerateOptions, made: Sequence[Optimised]) -> ImageSet:
    """The batches that the optimisation loop made as one set, with the facts that repeat them."""
    facts = {
        "precision": made[0].precision,
        "steps": [batch.steps for batch in made],
        "loss": [[batch.first, batch.last] for batch in made],
    }
    pixels = np.concatenate([batch.pixels for batch in made])
    made_by = provenance(generator, model, options) | facts
    return ImageSet.of(pixels, model.preprocess, source=f"synthetic:{generator}", made_by=made_by)
