"""Images of one generator, or of several in equal shares, as one set; and the same again from another seed.

Generators differ in what their images lack, so that several together come closer to real images than either alone.
Images that show nothing, or all the same thing, calibrate nothing: they are refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import cdist

from calibrators.errors import ImagesError
from calibrators.images import ImageSet, joined
from calibrators.registry import names, pick
from dfq_deploy.generation import GenerateOptions, Progress, quiet
from dfq_deploy.generation.device import device_named, moved_to
from dfq_deploy.generation.generators import ATTENTIVE
from dfq_deploy.models import Model

__all__ = [
    "generated",
    "made_with_next_seed",
    "make_images",
    "noise_like",
    "parts_of",
    "refuse_degenerate",
    "why_no_next_seed",
]

_READ = {"generator": str, "count": int, "seed": int, "exact": bool, "batch": int, "model_fingerprint": str}  # facts
_LEAST_CONTRAST = 0.01  # deviation of an image's values, and distance between images, of what lies between the bounds
_MOST_TWINS = 0.5  # share of the images that may show what another one shows
_LOOKED_AT = 1024  # values per image by which images are compared, at places drawn once
_ROWS = 256  # images compared with all others at a time, so that memory grows with their number, not its square
_SEEDS = 2**32
_NOISE_SEED = _SEEDS - 1  # hardly that of a set of noise that is looked at


def make_images(
    generators: Sequence[str], model: Model, options: GenerateOptions, *, progress: Progress = quiet
) -> ImageSet:
    """`options.count` images in all, the first generator's first; `progress` is told of one after the other.

    Raises:
        ImagesError: A generator cannot work on the model, or what it made is no set of images, or the memory is full.
    """
    parts: list[ImageSet] = []
    for number, name in enumerate(generators):
        count = (options.count + number) // len(generators)
        generator = pick("dfq_deploy.generation.generators", name)
        part = generated(name, generator, model, replace(options, count=count), progress)
        refuse_degenerate(name, part)
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    return ImageSet.of(
        np.concatenate([part.pixels[:] for part in parts]),
        model.preprocess,
        source=f"synthetic:{'+'.join(generators)}",
        made_by={name: dict(part.made_by) for name, part in zip(generators, parts, strict=True)},
        student=next((part.student for part in parts if part.student), None),
    )


def generated(name: str, recipe: Any, model: Model, options: GenerateOptions, progress: Progress = quiet) -> ImageSet:
    """What `recipe`, the generator `name` or one of its recipes, makes on the device of `options`.

    Raises:
        ImagesError: It cannot work on the model, or the memory is full around the steps; in them a batch is halved.
    """
    try:
        with moved_to(options.device, model):
            images: ImageSet = recipe.generate(model, options, progress=progress)
    except torch.OutOfMemoryError as cause:
        raise ImagesError(
            what=f"the memory of the {options.device} does not hold the model and what {name} needs beside it.",
            why=str(cause).partition("\n")[0],
            fix="stop what else is using it, or make the images on a larger machine.",
        ) from cause
    return images


def parts_of(images: ImageSet) -> tuple[Mapping[str, Any], ...]:
    """The facts of each part of `images` that a generator made, in their order; of files that were joined, of each.

    Facts that others wrote, of a generator that is none of these or without what repeats it, are of no part.
    """
    return _parts_in(images.made_by)


def _parts_in(made_by: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    whole = all(isinstance(made_by.get(fact), kind) for fact, kind in _READ.items())
    if whole and made_by["generator"] in names("dfq_deploy.generation.generators"):
        return (made_by,)
    parts = made_by.get("parts")
    inner = parts if isinstance(parts, list) else made_by.values()
    return tuple(part for facts in inner if isinstance(facts, Mapping) for part in _parts_in(facts))


def why_no_next_seed(images: ImageSet, model: Model) -> str | None:
    """Why `images` cannot be made once more out of `model` from another seed; None if they can."""
    parts = parts_of(images)
    if not parts:
        return "no generator made these images"
    if sum(part["count"] for part in parts) != len(images):
        return "these images are not all from generators, or not all that were made"
    if any(part["model_fingerprint"] != model.fingerprint for part in parts):
        return "these images were made out of another model"
    if any("settings" in part for part in parts):
        return "these images were made with settings of their own"
    if images.student is not None:
        return "another seed would teach another student"
    return None


def made_with_next_seed(images: ImageSet, model: Model, *, progress: Progress = quiet) -> ImageSet:
    """As many images of the same generators, set as they were, from the next seed; see `why_no_next_seed`.

    Where files with several seeds were joined, the next are those after the last of them.

    Raises:
        ImagesError: A generator breaks down on that seed.
    """
    parts = parts_of(images)
    seeds = [facts["seed"] for facts in parts]
    further = 1 + max(seeds) - min(seeds)
    made: list[ImageSet] = []
    for facts in parts:
        name, seed = facts["generator"], (facts["seed"] + further) % _SEEDS
        device = device_named("auto" if facts.get("device") == "cuda" else "cpu")
        options = GenerateOptions(facts["count"], seed, facts["exact"], first=facts.get("first", 0), device=device)
        generator = pick("dfq_deploy.generation.generators", name)
        recipe = generator.recipe_of(facts) if name in ATTENTIVE else generator
        made.append(generated(name, recipe, model, options, progress))
        refuse_degenerate(name, made[-1])
    return made[0] if len(made) == 1 else joined(made)


def noise_like(images: ImageSet, model: Model) -> ImageSet:
    """As many images of noise as `images`, to hold them against."""
    return make_images(["noise"], model, GenerateOptions(len(images), _NOISE_SEED))


def refuse_degenerate(generator: str, images: ImageSet) -> None:
    """Return if synthetic images are of use: those with NaN never became a set.

    Raises:
        ImagesError: An image shows one value only, or more than half of them show what another one shows.
    """
    low, high = images.preprocess.bounds
    least = _LEAST_CONTRAST * float((high - low).mean())
    values = int(np.prod(images.preprocess.shape))
    places = np.random.default_rng(0).choice(values, min(values, _LOOKED_AT), replace=False)
    sampled = np.empty((len(images), len(places)), np.float32)
    for number in range(len(images)):
        image = images.pixels[number : number + 1]
        if image.std() < least:
            raise _degenerate(generator, f"image {number} is of one colour")
        sampled[number] = image.ravel()[places]
    twins = _twins(sampled, least)
    if twins == len(images) > 1:
        raise _degenerate(generator, f"all {len(images)} images show the same, or one of few things")
    if twins > _MOST_TWINS * len(images):
        raise _degenerate(generator, f"{twins} of {len(images)} images show what another one shows")


def _twins(sampled: np.ndarray, least: float) -> int:
    """How many rows of `sampled` have another one at a mean distance below `least`."""
    found = 0
    for start in range(0, len(sampled), _ROWS):
        rows = sampled[start : start + _ROWS]
        distances = cdist(rows, sampled, "cityblock") / sampled.shape[1]
        distances[np.arange(len(rows)), start + np.arange(len(rows))] = np.inf
        found += int((distances.min(1) < least).sum())
    return found


def _degenerate(generator: str, fault: str) -> ImagesError:
    return ImagesError(
        what=f"the images of `{generator}` are of no use: {fault}.",
        why="ranges read off them would be those of no image that the model will see.",
        fix="check the weights, try another --seed, or another --generator.",
    )
