"""Images as a model takes them, with the facts of where they come from.

An `ImageSet` is a sequence of model-ready arrays, in memory, in a file or decoded when asked for, together with its
source and a fingerprint; a student that came about with them is part of it. No torch here.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from calibrators.errors import ImagesError
from calibrators.files import fingerprint_of, written_whole
from calibrators.headers import header_of, later, newer
from calibrators.preprocess import Preprocess
from calibrators.saved_pixels import STUDENT, SavedPixels
from calibrators.student import Student

__all__ = ["ImageSet", "Pixels", "is_image_set", "joined"]

_HEADER = "dfq_imageset"
_FORMAT = 1
_FIELDS = {"format", "preprocess", "source", "fingerprint", "made_by", "student"}
_CHUNK = 16  # images read at once, so that memory does not grow with their number


class Pixels(Protocol):
    """Model-ready images that are produced by slices without a step: (n, C, H, W) float32."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class ImageSet:
    """Model-ready images with their provenance.

    Attributes:
        pixels: The images, (N, C, H, W) float32 by slices.
        preprocess: What made them model-ready; they fit models with the same preprocessing only.
        source: Where they come from, for people: `folder:…`, `synthetic:psaq_v1`.
        fingerprint: SHA-256 that changes when any image or label does, or the student.
        labels: Class indices (N,) int64, or None.
        made_by: Facts that repeat a synthetic set: generator, seed, settings, model.
        student: What the calibrated model gets for weights, or None if it keeps its own.
        names: The images' files, where they have some; for people, and no part of the fingerprint.
        classes: Names of the classes that the labels count, where the source tells them; no part of it either.
    """

    pixels: Pixels
    preprocess: Preprocess
    source: str
    fingerprint: str
    labels: np.ndarray | None = None
    made_by: Mapping[str, Any] = field(default_factory=dict)
    student: Student | None = None
    names: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls,
        pixels: Pixels,
        preprocess: Preprocess,
        *,
        source: str,
        labels: np.ndarray | None = None,
        made_by: Mapping[str, Any] | None = None,
        student: Student | None = None,
    ) -> "ImageSet":
        """An ImageSet of model-ready pixels, each image checked and fingerprinted as it is read.

        Raises:
            ImagesError: There is no image, one has another shape than the model's input, or holds NaN or Inf.
        """
        digest = hashlib.sha256()
        for start in range(0, len(pixels), _CHUNK):
            chunk = pixels[start : start + _CHUNK]
            if chunk.shape[1:] != preprocess.shape:
                raise ImagesError(
                    what=f"images of shape {chunk.shape[1:]} do not fit the model's input.",
                    why=f"it takes {preprocess.shape}.",
                    fix="make the images with the same --model.",
                )
            finite = np.isfinite(chunk).all(axis=(1, 2, 3))
            if not finite.all():
                raise ImagesError(
                    what=f"image {start + int(finite.argmin())} of {source} holds NaN or Inf.",
                    why="a calibration or evaluation image must be finite.",
                    fix="make or pick the images again.",
                )
            digest.update(np.ascontiguousarray(chunk, np.float32).tobytes())
        if not len(pixels):
            raise ImagesError(
                what=f"{source} holds no images.", why="at least one is needed.", fix="make or pick some."
            )
        facts = [asdict(preprocess), digest.hexdigest(), None if labels is None else labels.tolist()]
        facts += [student.fingerprint] if student else []
        return cls(pixels, preprocess, source, fingerprint_of(facts), labels, made_by or {}, student)

    def __len__(self) -> int:
        return len(self.pixels)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """The images in order, in arrays of at most `size`."""
        for start in range(0, len(self), size):
            yield self.pixels[start : start + size]

    def spread(self, count: int) -> "ImageSet":
        """`count` of the images, evenly spaced over the set, in memory; all of them if there are no more.

        Raises:
            ImagesError: `count` is below 1.
        """
        if count < 1:
            raise ImagesError(
                what=f"{count} of {self.source} are no images.",
                why="at least one is needed.",
                fix="pass --limit 1 or more.",
            )
        if count >= len(self):
            return self
        index = np.arange(count) * len(self) // count
        pixels = np.concatenate([self.pixels[i : i + 1] for i in index.tolist()])
        labels = None if self.labels is None else self.labels[index]
        source = f"{count} of {self.source}"
        found = ImageSet.of(
            pixels, self.preprocess, source=source, labels=labels, made_by=self.made_by, student=self.student
        )
        names = None if self.names is None else tuple(self.names[i] for i in index.tolist())
        return replace(found, names=names, classes=self.classes)

    def save(self, path: Path) -> None:
        """Write the set as one safetensors file: `pixels`, `labels` and `student.…` if there are any, a JSON header."""
        tensors = {"pixels": self.pixels[: len(self)]}
        if self.labels is not None:
            tensors["labels"] = self.labels
        header: dict[str, Any] = {
            "format": _FORMAT,
            "preprocess": asdict(self.preprocess),
            "source": self.source,
            "fingerprint": self.fingerprint,
            "made_by": dict(self.made_by),
        }
        if self.student is not None:
            tensors |= {f"{STUDENT}{name}": value for name, value in self.student.weights.items()}
            header["student"] = {"model": self.student.model, "scheme": self.student.scheme}
        tensors = {name: np.ascontiguousarray(t) for name, t in tensors.items()}  # safetensors reads raw memory
        with written_whole(path) as temporary:
            save_file(tensors, temporary, {_HEADER: json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> "ImageSet":
        """The set in the file `path`; its pixels are read from the file when they are asked for.

        Raises:
            ImagesError: The file is missing, truncated, of another format, or holds other images than it says.
        """
        pixels = SavedPixels(path)
        try:
            header = header_of(pixels.metadata[_HEADER])
            facts, known = header["preprocess"], Preprocess.__dataclass_fields__
            if why := newer(header, reads=_FORMAT, known=_FIELDS) or newer(facts, reads=_FORMAT, known=known):
                raise later(ImagesError, path, why)
            if header["format"] != _FORMAT:
                raise ValueError(header["format"])
            preprocess = TypeAdapter(Preprocess).validate_python(facts)
            source, fingerprint, made_by = header["source"], header["fingerprint"], {**header["made_by"]}
            student = Student(pixels.student(), **header["student"]) if "student" in header else None
            if not isinstance(source, str) or (student and not isinstance(student.scheme, str)):
                raise TypeError(source)
        except (AttributeError, KeyError, TypeError, ValueError) as cause:
            raise ImagesError(
                what=f"`{path}` is not an ImageSet of format {_FORMAT}.",
                why=f"its header does not read as one ({type(cause).__name__}: {cause}).",
                fix="make it again with `dfq-deploy generate`.",
            ) from cause
        images = cls.of(pixels, preprocess, source=source, labels=pixels.labels, made_by=made_by, student=student)
        if images.fingerprint != fingerprint:
            raise ImagesError(
                what=f"`{path}` holds other images than its header says.",
                why="the fingerprint of what it holds differs from the recorded one.",
                fix="make it again with `dfq-deploy generate`.",
            )
        return images


def joined(sets: Sequence[ImageSet]) -> ImageSet:
    """The images of several sets with the same preprocessing as one, without labels, in memory.

    Raises:
        ImagesError: One of them brings a student, which serves its own images, or two hold the same images.
    """
    if any(images.student for images in sets):
        raise ImagesError(
            what="sets of images with a student cannot be joined.",
            why="a student learned from its own images, and a model can have the weights of one.",
            fix="pass one of them.",
        )
    seen: set[str] = set()
    for number, images in enumerate(sets, start=1):
        if images.fingerprint in seen:
            raise ImagesError(
                what=f"set {number} of {len(sets)} that are joined ({images.source}) was there before.",
                why="the same images twice show a calibration nothing more, and count double.",
                fix="name each set once; parts of one set differ in --first, others in --seed.",
            )
        seen.add(images.fingerprint)
    sources = " and ".join(dict.fromkeys(images.source for images in sets))
    pixels = np.concatenate([images.pixels[: len(images)] for images in sets])
    return ImageSet.of(
        pixels, sets[0].preprocess, source=sources, made_by={"parts": [images.made_by for images in sets]}
    )


def is_image_set(path: Path) -> bool:
    """Whether the file says of itself that it is an ImageSet; a missing or other file is none."""
    try:
        with safe_open(path, "numpy") as file:
            return _HEADER in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False
