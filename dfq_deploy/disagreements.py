"""The images on which an engine decides otherwise than the float model or its reference, and their pictures.

Comes out of a check, and is what a report shows of it: the images themselves are often elsewhere by then. The figures
go into report.json, the pictures onto one sheet in the run folder's `work`, which is not deployed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.special import softmax

from calibrators.files import sha256_of, written_whole
from calibrators.images import ImageSet
from calibrators.pictures import contact_sheet

__all__ = ["DISAGREEMENTS", "Decision", "Disagreement", "disagreements", "draw_disagreements"]

DISAGREEMENTS = Path("work") / "disagreements.png"
"""Where a check puts their pictures, in the bundle's folder."""
_MOST = 24


@dataclass(frozen=True)
class Decision:
    """What a model takes an image for.

    Attributes:
        index: The class, counted from 0.
        percent: How sure it is: the class's softmax.
    """

    index: int
    percent: float


@dataclass(frozen=True)
class Disagreement:
    """An image on which the engine decides otherwise than float or the reference.

    Attributes:
        image: Its number among the checked ones, from 0.
        name: Its file, where it has one.
        label: What it shows, where that is known.
        float: The float model's decision.
        reference: The reference's.
        engine: The engine's.
    """

    image: int
    name: str
    label: int | None
    float: Decision
    reference: Decision
    engine: Decision


def disagreements(logits: Mapping[str, np.ndarray], images: ImageSet) -> tuple[int, tuple[Disagreement, ...]]:
    """How many there are, and up to 24: first those that lost their right class, then those that float is surest of.

    Args:
        logits: Of `float`, `reference` and `engine`, each (N, classes).
        images: The N images.
    """
    shares = {name: softmax(logits[name], axis=-1) for name in ("float", "reference", "engine")}
    best = {name: values.argmax(-1) for name, values in shares.items()}
    differs = (best["engine"] != best["float"]) | (best["engine"] != best["reference"])
    labels = images.labels

    def order(image: int) -> tuple[bool, float]:
        lost = labels is not None and best["float"][image] == labels[image] != best["engine"][image]
        return not lost, -float(shares["float"][image].max())

    def decision(name: str, image: int) -> Decision:
        index = int(best[name][image])
        return Decision(index, round(100 * float(shares[name][image, index]), 1))

    found = sorted(np.flatnonzero(differs).tolist(), key=order)
    shown = tuple(
        Disagreement(
            image=image,
            name=images.names[image] if images.names else "",
            label=None if labels is None else int(labels[image]),
            float=decision("float", image),
            reference=decision("reference", image),
            engine=decision("engine", image),
        )
        for image in found[:_MOST]
    )
    return len(found), shown


def draw_disagreements(shown: tuple[Disagreement, ...], images: ImageSet, folder: Path) -> str:
    """Draw the sheet of the bundle in `folder`, its cells in the order of `shown`; returns its SHA-256, or ""."""
    path = folder / DISAGREEMENTS
    if not shown:
        path.unlink(missing_ok=True)
        return ""
    pixels = np.concatenate([images.pixels[one.image : one.image + 1] for one in shown])
    with written_whole(path) as temporary:
        contact_sheet(replace(images, pixels=pixels, labels=None, names=None)).save(temporary, format="png")
    return sha256_of(path)
