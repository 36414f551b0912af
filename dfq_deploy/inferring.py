"""Pictures in, classes out: what `dfq-deploy infer` does, with no torch.

Pictures go through the engine in batches. One that cannot be read is answered by its error; the others are answered.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibrators.decoding import Picture
from calibrators.errors import ImagesError
from dfq_deploy.runtime import Runner, load, refuse_others

__all__ = ["Answer", "Guess", "infer"]


@dataclass(frozen=True)
class Guess:
    """One class of a picture.

    Attributes:
        index: Which logit.
        name: What it stands for; empty where the bundle does not say.
        probability: By softmax, 0 to 1.
    """

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Answer:
    """What the engine says of one picture.

    Attributes:
        image: What it is called: its path, or its place among the pictures.
        classes: The most likely ones, the likeliest first; none where there is an error.
        error: Why it could not be read.
    """

    image: str
    classes: tuple[Guess, ...] = ()
    error: ImagesError | None = None


def infer(
    folder: str | Path,
    images: Sequence[Picture],
    *,
    top: int = 5,
    provider: str | None = None,
    verify: str | Path | None = None,
) -> list[Answer]:
    """An answer for each picture, in their order.

    Args:
        folder: A bundle, or a zip archive of one.
        images: Paths, bytes of files, PIL images or arrays.
        top: How many classes of each.
        provider: What runs the engine within ONNX Runtime, if not what it was exported for.
        verify: PEM file with the public key that the bundle must be signed with.

    Raises:
        BundleError: The bundle is incomplete or altered, not signed with that key, or its engine is pending.
        BackendError: Its run-time is not installed or cannot load it, or it is no classifier.
    """
    with load(folder, provider=provider, verify=verify) as runner:
        refuse_others(runner.manifest, "infer", "it names classes")
        size = runner.manifest.engine.options.batch[2]
        starts = range(0, len(images), size)
        return [answer for start in starts for answer in _answers(runner, images[start : start + size], start, top)]


def _answers(runner: Runner, images: Sequence[Picture], start: int, top: int) -> Iterator[Answer]:
    """The answers to as many pictures as fit a batch, the first of which is number `start`."""
    ready: list[np.ndarray | ImagesError] = []
    for image in images:
        try:
            ready.append(runner.preprocess(image))
        except ImagesError as error:
            ready.append(error)
    logits = iter(runner.answer([pixels for pixels in ready if isinstance(pixels, np.ndarray)]))
    for number, (image, pixels) in enumerate(zip(images, ready, strict=True), start=start):
        name = os.fspath(image) if isinstance(image, str | os.PathLike) else f"images[{number}]"
        if isinstance(pixels, ImagesError):
            yield Answer(name, error=pixels)
        else:
            yield Answer(name, _likeliest(next(logits)[0], runner.classes, top))


def _likeliest(logits: np.ndarray, names: Sequence[str] | None, top: int) -> tuple[Guess, ...]:
    shares = np.exp(logits.astype(np.float64) - logits.max())
    shares /= shares.sum()
    best = np.argsort(-shares, kind="stable")[:top].tolist()
    return tuple(Guess(index, names[index] if names else "", float(shares[index])) for index in best)
