"""The baseline: what an engine was and decided when a person last agreed to it, as a file that a reviewer can compare.

JSON: the summary first, then one line per image, by the SHA-256 of its pixels as the model takes them. A change of the
engine shows in a few lines above and one for each image on which it decides otherwise, in the order of the images; and
an image that is prepared differently is another image. The file holds no pixels and no labels.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from calibrators.errors import RecipeError
from calibrators.files import write_text
from calibrators.images import ImageSet, Pixels

__all__ = ["Baseline", "changes_between", "hashed"]

_Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]


class Baseline(BaseModel):
    """An engine that a person agreed to.

    Attributes:
        format: Version of this format.
        model: Name of the model.
        weights: Fingerprint of its name and weights.
        plan: Fingerprint of the plan.
        backend: What runs the engine.
        images: Where the images came from.
        mode: Whether they had labels.
        n: Number of images.
        top1: Label accuracy of the engine in percent, None without labels.
        agreement: Percentage of images on which the engine decides as float does.
        sqnr_db: Signal to quantization noise ratio of its logits against float's; None where it is not a number.
        size_bytes: Size of the engine.
        latency_ratio: Its time for one image over that of the float model, None where that could not be measured.
        decisions: The engine's class by image; 0 where the task has no one class for an image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal[1] = 1
    model: str
    weights: str
    plan: str
    backend: str
    images: str
    mode: Literal["labels", "synthetic"]
    n: Annotated[int, Field(ge=1)]
    top1: float | None
    agreement: float
    sqnr_db: float | None
    size_bytes: Annotated[int, Field(ge=1)]
    latency_ratio: Annotated[float, Field(gt=0)] | None
    decisions: Annotated[dict[_Hash, int], Field(min_length=1)]

    def save(self, path: Path) -> None:
        """Write the file."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Baseline":
        """The baseline in the file `path`.

        Raises:
            RecipeError: There is none.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as cause:
            raise RecipeError(
                what=f"there is no baseline `{path}`.",
                why=f"{cause.strerror}.",
                fix="write one with --update, once the engine is as it should be.",
            ) from cause
        except ValidationError as cause:
            error = cause.errors()[0]
            raise RecipeError(
                what=f"`{path}` is not a baseline of format 1.",
                why=f"{error['msg']} at `{'.'.join(map(str, error['loc']))}`.",
                fix="delete it, if it was one, and write it again with --update.",
            ) from cause

    def of(self, images: list[str]) -> np.ndarray:
        """Its decisions on `images`, -1 for those that it does not know."""
        return np.asarray([self.decisions.get(image, -1) for image in images])


def changes_between(before: Baseline | None, after: Baseline) -> Iterator[str]:
    """What an update changes, a line each."""
    if before is None:
        yield f"new: {after.n} images"
    else:
        for name in type(after).model_fields:
            old, new = getattr(before, name), getattr(after, name)
            if name != "decisions" and old != new:
                yield f"{name}: {old} -> {new}"
        common = before.decisions.keys() & after.decisions.keys()
        changed = [image for image in after.decisions if image in common and _differ(image, before, after)]
        yield f"decisions: {len(changed)} of {len(common)} changed" + (
            f", {len(after.decisions) - len(common)} new, {len(before.decisions) - len(common)} gone"
            if len(common) < max(len(before.decisions), len(after.decisions))
            else ""
        )
        for image in changed:
            yield f"  {image}: {before.decisions[image]} -> {after.decisions[image]}"


def _differ(image: str, before: Baseline, after: Baseline) -> bool:
    return before.decisions[image] != after.decisions[image]


def hashed(images: ImageSet) -> tuple[ImageSet, Mapping[int, str]]:
    """The same images, and their hashes by number once they have been read."""
    pixels = _HashedPixels(images.pixels)
    return replace(images, pixels=pixels), pixels.hashes


class _HashedPixels:
    """Pixels that are hashed as they are read, since reading them may be decoding them."""

    def __init__(self, pixels: Pixels) -> None:
        self.hashes: dict[int, str] = {}
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: slice, /) -> np.ndarray:
        read = self._pixels[index]
        for number, image in enumerate(read, start=index.start or 0):
            self.hashes[number] = hashlib.sha256(np.ascontiguousarray(image, np.float32).tobytes()).hexdigest()[:16]
        return read
