"""Where an ONNX model keeps weights outside its own file: only in files that the manifest names.

An entry `location` in a tensor names a file. Run-times differ in how they keep it within the folder, so it is looked at
before any of them opens the model.
"""

import importlib
import mmap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from calibrators.errors import BundleError

__all__ = ["refuse_outside"]


def refuse_outside(path: Path, names: Collection[str]) -> None:
    """Return if all external data of the model in the file `path` lie in files beside it that are called by `names`.

    Raises:
        BundleError: Some lie elsewhere, or the file is no model.
    """
    if not _may_name_files(path):
        return
    onnx = importlib.import_module("onnx")  # a quarter of a second, which hardly any bundle needs
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as cause:  # of protobuf's many
        raise BundleError(what=f"`{path}` is no ONNX model.", why=f"{cause}.", fix="export the model again.") from cause
    for location in _locations(model):
        if location not in names:
            raise BundleError(
                what=f"`{path}` wants weights from `{location}`.",
                why="the manifest names no such file, and nothing outside of a bundle is read.",
                fix="do not run it; export the model again.",
            )


def _may_name_files(path: Path) -> bool:
    """Whether the key `location` occurs in the file at all; protobuf writes it out."""
    if path.stat().st_size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return bool(content.find(b"location") >= 0)


def _locations(message: Any) -> Iterator[str]:
    """Each file that a tensor names, wherever in the model it is: graphs within nodes, functions, sparse tensors."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield from (entry.value for entry in message.external_data if entry.key == "location")
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in (value,) if hasattr(value, "ListFields") else value:
                yield from _locations(inner)
