"""Our images in other people's pipelines: an ImageSet as `.npz`, as a folder, as polygraphy's inputs, as ORT's reader.

The archive, polygraphy's file and the reader hold what the model takes, float32 (n, C, H, W), bit for bit, under the
name `images` that our ONNX models give their input. Nothing loads the whole set: each writes a few images at a time.
"""

import csv
import zipfile
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader

from calibrators.errors import ImagesError, RecipeError
from calibrators.files import folder_written_whole, written_whole
from calibrators.images import ImageSet
from calibrators.pictures import picture

try:
    from polygraphy import json as polygraphy_json
except ImportError:
    polygraphy_json = None

__all__ = ["INPUT", "ImageSetReader", "write_folder", "write_npz", "write_polygraphy"]

INPUT = "images"
_CHUNK = 16
_CHANNELS = (1, 3)  # that a picture of the folder has


class ImageSetReader(CalibrationDataReader):  # type: ignore[misc]
    """ONNX Runtime's calibrators and `quantize_static` read an ImageSet through this.

    A batch that cannot be read raises out of `get_next`: calibration never ends early. ONNX Runtime's percentile and
    entropy calibrators stack what they collect, so with them `batch_size` must divide the number of images.

    Args:
        images: What to read.
        input_name: The model's input.
        batch_size: Images at a time.
    """

    def __init__(self, images: ImageSet, *, input_name: str = INPUT, batch_size: int = 1) -> None:
        self._images, self._input, self._size = images, input_name, batch_size
        self.rewind()

    def rewind(self) -> None:
        """Begin again with the first image."""
        self.set_range(0, len(self))

    def set_range(self, start_index: int, end_index: int) -> None:
        """Read the batches from `start_index` up to `end_index`; what `CalibStridedMinMax` asks for."""
        self._next, self._end = start_index, min(end_index, len(self))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch by the input's name, None after the last."""
        if self._next >= self._end:
            return None
        start = self._next * self._size
        self._next += 1
        return {self._input: np.ascontiguousarray(self._images.pixels[start : start + self._size])}

    def __len__(self) -> int:
        return -(-len(self._images) // self._size)


def write_npz(images: ImageSet, path: Path) -> None:
    """Write `images` (N, C, H, W) float32 and, where there are any, `labels` (N,) int64; the same set, the same bytes.

    The `npz:` source is for raw pixels, uint8, and does not read it; `np.load` does.
    """
    with written_whole(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        shape = (len(images), *images.preprocess.shape)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        with archive.open(zipfile.ZipInfo("images.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for batch in images.batches(_CHUNK):
                file.write(batch.astype("<f4").tobytes())
        if images.labels is not None:
            with archive.open(zipfile.ZipInfo("labels.npy"), "w") as file:
                np.lib.format.write_array(file, images.labels)


def write_folder(images: ImageSet, path: Path) -> None:
    """Write one PNG per image and, where there are labels, a `labels.csv` as the `folder:` source reads it.

    Pixels are put back to 0..255 and rounded to 8 bits, those beyond black and white clipped: exact for images that
    were pictures, lossy for synthetic ones. A picture shows the model's input, that is what was left after cropping:
    whoever reads it with a preprocessing whose `crop_pct` is below 1 crops once more.

    Raises:
        ImagesError: Something is at `path` already, or a picture cannot hold the channels.
    """
    if (channels := images.preprocess.shape[0]) not in _CHANNELS:
        raise ImagesError(
            what=f"images of {channels} channels are no pictures.",
            why="those have one channel or three.",
            fix="pass --to npz, which holds any number.",
        )
    if path.exists():
        raise ImagesError(
            what=f"`{path}` is there already.",
            why="pictures of two sets in one folder could not be told apart.",
            fix="pass another folder with --out.",
        )
    names = [f"{index:0{len(str(len(images) - 1))}}.png" for index in range(len(images))]
    with folder_written_whole(path) as temporary:
        written = iter(names)
        for batch in images.batches(_CHUNK):
            for pixels in batch:
                picture(pixels, images.preprocess).save(temporary / next(written))
        if images.labels is not None:
            with (temporary / "labels.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([("file", "label"), *zip(names, images.labels.tolist(), strict=True)])


def write_polygraphy(images: ImageSet, path: Path, *, batch_size: int = 1) -> None:
    """Write what polygraphy's `--load-inputs` reads: a list of one `{images: array}` per batch.

    The file holds the arrays in base64, 4/3 of their size, and polygraphy reads all of it into memory.

    Raises:
        RecipeError: polygraphy is not installed.
    """
    if polygraphy_json is None:
        raise RecipeError(
            what="polygraphy's inputs cannot be written.",
            why="the arrays in them are encoded by polygraphy, which is not installed.",
            fix="pip install polygraphy.",
        )
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        separator = "["
        for batch in images.batches(batch_size):
            file.write(separator + polygraphy_json.to_json({INPUT: np.ascontiguousarray(batch)}))
            separator = ",\n"
        file.write("]\n")
