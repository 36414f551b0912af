"""Images in a folder: class sub-folders, or any images with a `labels.csv` (`file,label`) beside them.

Images are decoded when they are asked for, so memory does not grow with their number. With class sub-folders
the label is the sub-folder's index in sorted order, of which empty ones have theirs; with `labels.csv` it is
what the file says; else there is none.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from calibrators.errors import ImagesError
from calibrators.files import fingerprint_of, sha256_of
from calibrators.images import ImageSet
from calibrators.preprocess import PreparedPixels, Preprocess

__all__ = ["open_images"]

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def open_images(path: Path, preprocess: Preprocess) -> ImageSet:
    """The images under `path`.

    Raises:
        ImagesError: The folder is missing or holds no image, `labels.csv` is malformed or names a file that
            is not there, or (when a slice is read) a file is not a whole image.
    """
    if not path.is_dir():
        raise ImagesError(
            what=f"there is no folder `{path}`.",
            why="`folder:PATH` reads a folder of images.",
            fix="check the path.",
        )
    labels: list[int] | None = None
    classes: tuple[str, ...] | None = None
    if (path / "labels.csv").exists():
        files, labels = _listed(path)
    else:
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in _SUFFIXES and f.is_file())
        files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts)]
        folders = sorted(d.name for d in path.iterdir() if d.is_dir() and not d.name.startswith("."))
        if all(f.parent.parent == path and f.parent.name in folders for f in files):
            labels, classes = [folders.index(f.parent.name) for f in files], tuple(folders)
    if not files:
        raise ImagesError(
            what=f"`{path}` holds no images.",
            why=f"no file ends in {', '.join(sorted(_SUFFIXES))}.",
            fix="check the path.",
        )
    named = tuple(str(f.relative_to(path)) for f in files)
    facts = [asdict(preprocess), labels, [[name, sha256_of(f)] for name, f in zip(named, files, strict=True)]]
    return ImageSet(
        pixels=PreparedPixels(files, preprocess),
        preprocess=preprocess,
        source=f"folder:{path.name}",
        fingerprint=fingerprint_of(facts),
        labels=None if labels is None else np.asarray(labels, np.int64),
        names=named,
        classes=classes,
    )


def _listed(path: Path) -> tuple[list[Path], list[int]]:
    files: list[Path] = []
    labels: list[int] = []
    text = (path / "labels.csv").read_bytes().decode("utf-8-sig", errors="replace")
    for number, row in enumerate(_rows(path / "labels.csv", text), start=2):
        try:
            files.append(path / row["file"])
            files[-1].relative_to(path)  # raises where it is an absolute path to somewhere else
            labels.append(int(np.int64(int(row["label"]))))
        except (KeyError, OverflowError, TypeError, ValueError) as cause:
            raise ImagesError(
                what=f"line {number} of `{path / 'labels.csv'}` is not `file,label`.",
                why=f"it reads {row}.",
                fix="give the file a header `file,label` and a whole number as each label.",
            ) from cause
    missing = [f for f in files if not f.is_file()]
    if missing:
        raise ImagesError(
            what=f"`{missing[0]}` is missing.",
            why=f"`labels.csv` names it, and {len(missing) - 1} more that are not there.",
            fix="put the images beside labels.csv, or take their lines out.",
        )
    return files, labels


def _rows(path: Path, text: str) -> Iterator[dict[str, str]]:
    try:
        yield from csv.DictReader(io.StringIO(text, newline=""))
    except csv.Error as cause:
        raise ImagesError(
            what=f"`{path}` is no table.",
            why=f"{cause}; a quote may have no end.",
            fix="give the file a header `file,label` and a line for each image.",
        ) from cause
