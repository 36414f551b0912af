"""Batches: how an order of many images is divided, and what every synthetic set records about itself.

A batch's random numbers come from the order's seed and the batch's number alone, so any batch can be made alone, on any
machine, before or after the others. Where the memory does not hold a batch, all are made half as large. Nothing here
knows what is made.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file

from calibrators.errors import CalibrationWarning, ImagesError
from calibrators.files import fingerprint_of
from calibrators.images import ImageSet
from dfq_deploy.generation import BATCH, GenerateOptions, Progress
from dfq_deploy.generation.checkpoint import save_state
from dfq_deploy.generation.engine import Batch, Learner, Optimised, fast_dtype
from dfq_deploy.models import Model

__all__ = ["batches", "in_batches", "kept_batches", "optimised_set", "provenance", "settings_of"]

_Made = TypeVar("_Made")


def batches(options: GenerateOptions, most: int | None = None) -> Iterator[tuple[int, torch.Generator]]:
    """Size and random generator (on the CPU) of each batch, in order; all but the last hold `most`, or `BATCH`."""
    most = most or BATCH
    for number, start in enumerate(range(0, options.count, most), options.first // most):
        seed = np.random.SeedSequence((options.seed, number)).generate_state(1, np.uint64)
        yield min(most, options.count - start), torch.Generator().manual_seed(int(seed[0]))


def in_batches(
    options: GenerateOptions, one_batch: Callable[[Batch], _Made], progress: Progress
) -> tuple[list[_Made], int]:
    """What `one_batch` makes of each batch, and the size of whole ones; `progress` is told of all of them as one.

    Raises:
        ImagesError: The device's memory does not hold half a batch either.
    """
    whole = min(BATCH, options.count)
    try:
        return _made(options, BATCH, one_batch, progress), BATCH
    except torch.OutOfMemoryError as cause:
        if whole == 1:
            raise _too_large(whole) from cause
    half = whole // 2  # from here on, when the failed step's tensors are gone
    told = f"the memory does not hold {whole} images at once: they are made again, {half} at once."
    warnings.warn(told, CalibrationWarning, stacklevel=2)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        return _made(options, half, one_batch, progress), half
    except torch.OutOfMemoryError as cause:
        raise _too_large(half) from cause


def _made(
    options: GenerateOptions,
    most: int,
    one_batch: Callable[[Batch], _Made],
    progress: Progress,
) -> list[_Made]:
    shares = list(batches(options, most))
    return [
        one_batch(
            Batch(
                size,
                generator,
                functools.partial(_tell_share, progress, number, len(shares)),
                first=options.first + number * most,
            )
        )
        for number, (size, generator) in enumerate(shares)
    ]


def _too_large(images: int) -> ImagesError:
    return ImagesError(
        what=f"the device's memory does not hold {images} images at once.",
        why="each step keeps what the model computes of all of them, for the gradient.",
        fix="pass a smaller --count, free memory on the device, or use the generator `dead_leaves`.",
    )


def _tell_share(
    progress: Progress, number: int, shares: int, step: int, steps: int, terms: Mapping[str, float]
) -> None:
    progress(number * steps + step, shares * steps, terms)


def provenance(generator: str, model: Model, options: GenerateOptions) -> dict[str, Any]:
    """Facts for `ImageSet.made_by` that repeat a synthetic set.

    `passes` are those of the whole network, per image that is made: none, where no loop says otherwise. Seconds are not
    among the facts, since one seed gives the same bytes.
    """
    return {
        "generator": generator,
        "count": options.count,
        "first": options.first,
        "seed": options.seed,
        "exact": options.exact,
        "batch": BATCH,
        "passes": {"forward": 0.0, "backward": 0.0},
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": options.device,
    }


def settings_of(recipe: Any) -> dict[str, Any]:
    """The fields of a recipe, a dataclass, that are not as by default, as facts of a set; none where all are."""
    set_otherwise = {
        field.name: value for field in fields(recipe) if (value := getattr(recipe, field.name)) != field.default
    }
    return {"settings": set_otherwise} if set_otherwise else {}


def optimised_set(
    generator: str,
    model: Model,
    options: GenerateOptions,
    one_batch: Callable[[Batch], Optimised],
    progress: Progress,
    settings: dict[str, Any] | None = None,
    learner: Learner | None = None,
) -> ImageSet:
    """What the optimisation loop makes, batch after batch, as one set, with the facts that repeat it.

    Args:
        generator: The recipe's name.
        model: The model that the images are for.
        options: How many, and from which seed.
        one_batch: Makes a batch of a size.
        progress: Told of all batches as one.
        settings: What else decides on the images.
        learner: Who learns from them, and goes on from one batch to the next.

    Raises:
        ImagesError: The device's memory does not hold half a batch either.
    """
    origin = provenance(generator, model, options) | (settings or {})
    made, whole = kept_batches(origin, model, options, one_batch, progress, learner)
    facts = {
        "precision": made[0].precision,
        "steps": [batch.steps for batch in made],
        "loss": [[batch.first, batch.last] for batch in made],
        "batch": whole,
        "passes": {
            "forward": sum(batch.forward for batch in made) / options.count,
            "backward": sum(batch.backward for batch in made) / options.count,
        },
    }
    pixels = np.concatenate([batch.pixels for batch in made])
    return ImageSet.of(pixels, model.preprocess, source=f"synthetic:{generator}", made_by=origin | facts)


def kept_batches(
    origin: Mapping[str, Any],
    model: Model,
    options: GenerateOptions,
    one_batch: Callable[[Batch], Optimised],
    progress: Progress,
    learner: Learner | None = None,
) -> tuple[list[Optimised], int]:
    """As `in_batches`; finished batches, and what an unfinished one has come to, are kept where `options.keep_in` says.

    Those that are not there are made by `options.elsewhere` first, where there is such; what it leaves is made here.
    """
    folder = options.keep_in
    if folder is None:
        return in_batches(options, one_batch, progress)
    if options.elsewhere is not None:
        shares = enumerate(batches(options))
        missing = [
            (options.first + number * BATCH, size)
            for number, (size, generator) in shares
            if not _kept_at(folder, origin, model, size, generator, []).exists()
        ]
        if missing:
            options.elsewhere(origin["generator"], missing, progress)
    return in_batches(options, functools.partial(_kept, folder, origin, model, one_batch, learner), progress)


def _kept_at(
    folder: Path, origin: Mapping[str, Any], model: Model, size: int, generator: torch.Generator, more: Sequence[object]
) -> Path:
    """The file of a batch that has not been begun: its name says all that it depends on, `more` among it."""
    device = next(model.module.parameters()).device
    facts = [{**origin, "count": size, "first": 0}, generator.initial_seed(), *more]
    facts += [device.type, str(fast_dtype(device)), *(version(name) for name in ("dfq-deploy", "timm"))]
    return folder / f"batch-{fingerprint_of(facts)[:16]}.safetensors"


def _kept(
    folder: Path,
    origin: Mapping[str, Any],
    model: Model,
    one_batch: Callable[[Batch], Optimised],
    learner: Learner | None,
    batch: Batch,
) -> Optimised:
    """The batch from its file; made, and put there, if it is not; taken up where a run left it, if one has.

    What a learner came to lies beside the batch that it came to that in, which depends on all batches before it: whole
    ones of one size, as many as stand before its first image.
    """
    path = _kept_at(
        folder, origin, model, batch.size, batch.generator, [batch.first, *learner.facts] if learner else []
    )
    unfinished, learned = path.with_suffix(".unfinished"), path.with_suffix(".learned")
    if path.exists() and (learner is None or learned.exists()):
        kept = ImageSet.load(path)
        if learner:
            learner.take_up(load_file(learned))
        batch.progress(1, 1, {})
        return Optimised(pixels=kept.pixels[: len(kept)], **kept.made_by)
    made = one_batch(replace(batch, unfinished=unfinished))
    if learner:
        save_state(learned, learner.state())
    of_loop = {field.name: getattr(made, field.name) for field in fields(made) if field.name != "pixels"}
    ImageSet.of(made.pixels, model.preprocess, source="batch", made_by=of_loop).save(path)
    unfinished.unlink(missing_ok=True)
    return made
