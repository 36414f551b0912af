"""Our images and plans in the formats of other tools; and what another tool needs to read an ImageSet itself.

Comes in between: it opens what the command line names and hands it to the writers in `calibrators`. No torch.
"""

import warnings
from pathlib import Path
from typing import Literal

from calibrators.calibration_cache import VERSION, write_cache
from calibrators.errors import CalibrationWarning, RecipeError
from calibrators.images import ImageSet
from calibrators.interchange import ImageSetReader, write_folder, write_npz, write_polygraphy
from calibrators.plan import QuantPlan
from calibrators.tensors import tensors_of

__all__ = ["ImageSet", "ImageSetReader", "convert"]

_WRITERS = {"npz": write_npz, "folder": write_folder, "polygraphy": write_polygraphy}


def convert(
    file: str | Path,
    out: str | Path,
    *,
    to: Literal["npz", "folder", "polygraphy", "cache"],
    onnx: Path | None = None,
    tensorrt: str | None = None,
) -> None:
    """Write the ImageSet or, for `cache`, the plan in `file` as something that another tool reads.

    Args:
        file: An ImageSet file, or a plan.
        out: The file or, for `folder`, the folder to write.
        to: Images as a NumPy archive, as pictures or as polygraphy's inputs; a plan as TensorRT's calibration cache.
        onnx: For `cache`: the float model that TensorRT gets, whose tensors the cache then names. Without it a tensor
            is called by its site, which leaves out the model's input and a tensor's second reader.
        tensorrt: For `cache`: version of the TensorRT that reads it, which takes its own only; 10.16.1 if not said.

    Raises:
        DeployError: `file` is not what `to` takes, or cannot be written as that.
    """
    if to == "cache":
        plan = QuantPlan.load(Path(file))
        tensors = None if onnx is None else tensors_of(plan.sites, onnx)
        write_cache(plan, Path(out), tensors=tensors, version=tensorrt or VERSION)
        return
    if onnx is not None or tensorrt is not None:
        raise RecipeError(
            what=f"--onnx and --tensorrt mean nothing to `{to}`.",
            why="they say which model and which TensorRT a calibration cache is for.",
            fix="leave them out, or pass --to cache.",
        )
    if to not in _WRITERS:
        raise RecipeError(
            what=f"there is no `{to}` to convert to.",
            why=f"there are {', '.join(_WRITERS)} and cache.",
            fix="pass one.",
        )
    images = ImageSet.load(Path(file))
    if images.student is not None:
        note = f"the student stays in {file}: no other format holds more than images."
        warnings.warn(note, CalibrationWarning, stacklevel=2)
    _WRITERS[to](images, Path(out))
