"""The bundle: the folder that is deployed, and the manifest that says what is in it.

A bundle holds `model.onnx` (with `model.onnx.data` beside it past 2 GB), `plan.safetensors`, `manifest.json`, and
`float.onnx` where it was asked for; `report.json` lies beside them and is rewritten by every check. The manifest is
written last, so a folder with a manifest is whole. It holds no pickle, and reading it needs no torch.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from calibrators.errors import BundleError, ImagesError
from calibrators.files import sha256_of, written_whole
from calibrators.images import Preprocess
from exporters.census import Precision

__all__ = ["MANIFEST", "Manifest", "ModelFacts", "open_bundle", "seal_bundle"]

MANIFEST = "manifest.json"
_ALWAYS = ("model.onnx", "plan.safetensors")
_FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]  # a name, never a path
_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelFacts(_Facts):
    """Which model is in the bundle, and how to get its torch form again."""

    name: str
    checkpoint: str | None
    random_weights: bool
    seed: int
    fingerprint: _Sha256
    classes: int


class Manifest(_Facts):
    """What a bundle holds and what made it.

    Attributes:
        format: Version of this format.
        model: The model.
        preprocess: How an image becomes its input.
        backend: What runs `model.onnx`.
        scheme: Number formats.
        recipe: Every option of the run.
        images: Where the calibration images came from, and their fingerprint.
        float_parity: Largest difference of the float ONNX model from torch, relative to the largest logit.
        precision: `int8` or `float` by layer, from the census.
        reasons: Why a layer is float.
        versions: Versions of what made the bundle.
        files: SHA-256 by file name.
    """

    format: Literal[1] = 1
    model: ModelFacts
    preprocess: Preprocess
    backend: str
    scheme: str
    recipe: dict[str, Any]
    images: dict[str, str]
    float_parity: float
    precision: dict[str, Precision]
    reasons: dict[str, str]
    versions: dict[str, str]
    files: dict[_FileName, _Sha256]


def seal_bundle(folder: Path, manifest: Manifest, files: list[str]) -> None:
    """Write the manifest, last of all, with the hashes of `files`, which lie in `folder`."""
    sealed = manifest.model_copy(update={"files": {name: sha256_of(folder / name) for name in files}})
    with written_whole(folder / MANIFEST) as temporary:
        temporary.write_text(sealed.model_dump_json(indent=1), encoding="utf-8")


def open_bundle(folder: Path) -> Manifest:
    """The manifest of the bundle in `folder`, every file held against its hash.

    Raises:
        BundleError: There is no bundle, a file is missing or altered, or the manifest is of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            what=f"`{folder}` is not a bundle.",
            why=f"it holds no {MANIFEST}, which an export writes last.",
            fix="run `dfq-deploy export … --out` on that folder; a run that was cut off goes on where it was.",
        )
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (ValidationError, ImagesError) as cause:
        reason = f"{e['msg']} at `{'.'.join(map(str, e['loc']))}`" if (e := _first(cause)) else str(cause)
        raise BundleError(
            what=f"`{path}` cannot be read as a manifest of format 1.",
            why=reason,
            fix="export the model again; a manifest is not edited by hand.",
        ) from cause
    unnamed = [name for name in _ALWAYS if name not in manifest.files]
    if unnamed:
        raise BundleError(
            what=f"`{path}` does not name {unnamed[0]}.",
            why="every bundle holds it, and what the manifest does not name is not verified.",
            fix="export the model again; a manifest is not edited by hand.",
        )
    for name, recorded in manifest.files.items():
        file = folder / name
        if not file.is_file() or sha256_of(file) != recorded:
            raise BundleError(
                what=f"`{file}` is {'altered' if file.is_file() else 'missing'}.",
                why="the manifest records it with another content." if file.is_file() else "the manifest names it.",
                fix="copy the bundle again, whole, or export the model again.",
            )
    return manifest


def _first(cause: Exception) -> Any:
    return cause.errors()[0] if isinstance(cause, ValidationError) else None
