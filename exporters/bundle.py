"""The bundle: the folder that is deployed, and the manifest that says what is in it.

A bundle holds `model.onnx` (with `model.onnx.data` beside it past 2 GB), `plan.safetensors`, `manifest.json`, the
engine where the run-time has one of its own and it is built, and `float.onnx` where it was asked for; `report.json`
lies beside them and is rewritten by every check. The manifest is written last, so a folder with a manifest is whole. It
holds no pickle, and reading it needs no torch.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from calibrators.errors import BundleError, ImagesError
from calibrators.files import sha256_of, written_whole
from calibrators.images import Preprocess
from exporters.backends import BuildOptions, Built
from exporters.census import Census, Precision

__all__ = ["MANIFEST", "EngineFacts", "Manifest", "ModelFacts", "files_in", "open_bundle", "seal_bundle"]

MANIFEST = "manifest.json"
_ALWAYS = ("model.onnx", "plan.safetensors")
_FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]  # a name, never a path
_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelFacts(_Facts):
    """Which model is in the bundle, and how to get its torch form again.

    Attributes:
        name: timm's name, or `demo`.
        checkpoint: The weights file, if the weights did not come from timm's hub.
        random_weights: Whether the weights were drawn at random.
        seed: Of random weights.
        fingerprint: SHA-256 of the name and the weights as they were loaded.
        classes: Number of logits.
        refined: Files in the run folder's `work` with changed weights: of a student that came with the calibration
            images, after the transforms, after the corrections. Each holds all that differs from the weights as they
            were loaded.
    """

    name: str
    checkpoint: str | None
    random_weights: bool
    seed: int
    fingerprint: _Sha256
    classes: int
    refined: tuple[_FileName, ...] = ()

    @property
    def student(self) -> bool:
        """Whether the weights are those of a student."""
        return any(name.startswith("student-") for name in self.refined)


class EngineFacts(_Facts):
    """How far the engine is, and what it fits.

    Attributes:
        state: `built`, or `pending`: `dfq-deploy build` makes it on the machine that will run it.
        options: What it is built for.
        files: Names of its files, where the run-time does not load `model.onnx` itself.
        made_for: Versions and GPU that it depends on.
        precision: What each layer is computed in, from the census.
        reasons: Why a layer is float, or finer than was asked for.
        kernels: How many kernels of which kind it has, where the run-time says.
        note: Why it is pending, or who says what its layers are computed in.
    """

    state: Literal["built", "pending"]
    options: BuildOptions
    files: list[_FileName]
    made_for: dict[str, str]
    precision: dict[str, Precision]
    reasons: dict[str, str]
    kernels: dict[str, int]
    note: str

    @classmethod
    def of(cls, built: Built, options: BuildOptions) -> "EngineFacts":
        """What a build gave."""
        census = built.census
        return cls(
            state=built.state,
            options=options,
            files=list(built.files),
            made_for=dict(built.made_for),
            precision=dict(census.precision),
            reasons=dict(census.reasons),
            kernels=dict(census.kernels),
            note=built.note,
        )

    @property
    def census(self) -> Census:
        """What each layer is computed in."""
        return Census(self.precision, self.reasons, self.kernels)

    def report(self) -> dict[str, Any]:
        """The engine as JSON in a report."""
        return {
            "state": self.state,
            "targets": list(self.options.targets),
            "layers": self.census.counts,
            "kernels": self.kernels,
            "made_for": self.made_for,
            "note": self.note,
        }


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
        engine: How far the engine is.
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
    engine: EngineFacts
    versions: dict[str, str]
    files: dict[_FileName, _Sha256]


def seal_bundle(folder: Path, manifest: Manifest, files: list[str]) -> None:
    """Write the manifest, last of all, with the hashes of `files`, which lie in `folder`."""
    sealed = manifest.model_copy(update={"files": {name: sha256_of(folder / name) for name in files}})
    with written_whole(folder / MANIFEST) as temporary:
        temporary.write_text(sealed.model_dump_json(indent=1), encoding="utf-8")


def files_in(folder: Path) -> set[str]:
    """Names of the files of the bundle in `folder`, unverified; none where there is none."""
    try:
        return set(Manifest.model_validate_json((folder / MANIFEST).read_bytes()).files)
    except (OSError, ValidationError, ImagesError):
        return set()


def open_bundle(folder: Path, *, engine: bool = True) -> Manifest:
    """The manifest of the bundle in `folder`, every file held against its hash.

    Args:
        folder: A bundle.
        engine: Look at the engine's files too; a build, which makes them anew, does not.

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
    unnamed = [name for name in _ALWAYS if name not in manifest.files or name in manifest.engine.files]
    if unnamed:
        raise BundleError(
            what=f"`{path}` does not name {unnamed[0]}.",
            why="every bundle holds it, and what the manifest does not name is not verified.",
            fix="export the model again; a manifest is not edited by hand.",
        )
    for name, recorded in manifest.files.items():
        file, of_engine = folder / name, name in manifest.engine.files
        if of_engine and not engine:
            continue
        if not file.is_file() or sha256_of(file) != recorded:
            raise BundleError(
                what=f"`{file}` is {'altered' if file.is_file() else 'missing'}.",
                why="the manifest records it with another content." if file.is_file() else "the manifest names it.",
                fix=f"build the engine again: dfq-deploy build {folder}"
                if of_engine
                else "copy the bundle again, whole, or export the model again.",
            )
    return manifest


def _first(cause: Exception) -> Any:
    return cause.errors()[0] if isinstance(cause, ValidationError) else None
