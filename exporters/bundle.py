"""The bundle: the folder that is deployed, and the manifest that says what is in it.

A bundle holds `model.onnx` (with `model.onnx.data` beside it past 2 GB), `plan.safetensors`, `manifest.json`, the
engine where the run-time has one of its own and it is built, and `float.onnx` where it was asked for; `report.json`
lies beside them and is rewritten by every check. The manifest is written last, so a folder with a manifest is whole; a
signature of it, `manifest.sig`, comes after it. A bundle holds no pickle, and reading one needs no torch.

Nothing in it is trusted before it is checked: first the signature, if one is asked for, then the manifest, then each
file against its hash. The folder itself may be a link; what lies in it may not.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, field_validator, model_validator

from calibrators.errors import BundleError, ImagesError
from calibrators.files import is_plain_file, sha256_of, write_text, written_whole
from calibrators.headers import header_of, later, newer
from calibrators.preprocess import Preprocess
from exporters.backends import BuildOptions, Built
from exporters.census import Census, Precision
from exporters.external_data import refuse_outside
from exporters.outputs import Output
from exporters.signing import SIGNATURE, Signer, verifier

__all__ = [
    "MANIFEST",
    "EngineFacts",
    "Manifest",
    "ModelFacts",
    "open_bundle",
    "seal_bundle",
    "sign_bundle",
    "unseal_bundle",
]

MANIFEST = "manifest.json"
_ALWAYS = ("model.onnx", "plan.safetensors")
_FORMAT = 1
_LARGEST = 2**26  # bytes of a manifest
_FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]  # a name, never a path
_TaskName = Annotated[str, StringConstraints(pattern=r"^[a-z_]+$")]
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
        classes: Number of classes that it tells apart; 0 where it knows none.
        refined: Files in the run folder's `work` with changed weights: of a student that came with the calibration
            images, after the transforms, after the corrections. Each holds all that differs from the weights as they
            were loaded.
        task: What its outputs are.
        outputs: What it puts out; one that names none has a classifier's logits.
        wrapped: Whether it came from Python and not by its name, so that only who made it has its torch form.
    """

    name: str
    checkpoint: str | None
    random_weights: bool
    seed: int
    fingerprint: _Sha256
    classes: int
    refined: tuple[_FileName, ...] = ()
    task: _TaskName = "classification"
    outputs: tuple[Output, ...] = ()
    wrapped: bool = False

    @model_validator(mode="after")
    def _has_an_output(self) -> "ModelFacts":
        if not self.outputs:
            object.__setattr__(self, "outputs", (Output("logits", (self.classes,)),))
        return self

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

    @field_validator("options")
    @classmethod
    def _batch_sizes_ascend(cls, options: BuildOptions) -> BuildOptions:
        smallest, usual, largest = options.batch
        if not 1 <= smallest <= usual <= largest < 2**31:
            message = f"{options.batch} are no sizes of batches"
            raise ValueError(message)
        return options

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

    @model_validator(mode="after")
    def _says_what_is_read(self) -> "Manifest":
        calib, block = self.recipe.get("calib"), self.recipe.get("block")
        if not (isinstance(calib, str) and isinstance(block, int) and {"source", "fingerprint"} <= self.images.keys()):
            message = "`recipe` lacks `calib` or `block`, or `images` lacks `source` or `fingerprint`"
            raise ValueError(message)
        return self


def seal_bundle(folder: Path, manifest: Manifest, files: list[str], *, sign: Signer | None = None) -> None:
    """Write the manifest, last of all but its signature, with the hashes of `files`, which lie in `folder`."""
    sealed = manifest.model_copy(update={"files": {name: sha256_of(folder / name) for name in files}})
    (folder / SIGNATURE).unlink(missing_ok=True)  # of another manifest
    write_text(folder / MANIFEST, sealed.model_dump_json(indent=1))
    if sign is not None:
        sign_bundle(folder, sign)


def sign_bundle(folder: Path, sign: Signer) -> None:
    """Write the signature of the manifest that lies in `folder`."""
    with written_whole(folder / SIGNATURE) as temporary:
        temporary.write_bytes(sign((folder / MANIFEST).read_bytes()))


def unseal_bundle(folder: Path) -> set[str]:
    """Make `folder` no bundle, before its files change; returns the names of those that it had as one.

    What was signed, and what was found out about the engine, goes with the manifest.
    """
    try:
        files = set(Manifest.model_validate_json((folder / MANIFEST).read_bytes()).files)
    except (OSError, ValidationError, ImagesError):
        files = set()
    for name in (MANIFEST, SIGNATURE, "report.json"):
        (folder / name).unlink(missing_ok=True)
    return files


def open_bundle(folder: Path, *, engine: bool = True, verify: str | Path | None = None) -> Manifest:
    """The manifest of the bundle in `folder`, every file held against its hash.

    Args:
        folder: A bundle.
        engine: Look at the engine's files too; a build, which makes them anew, does not.
        verify: PEM file with the public key that the manifest must be signed with; None: signed or not.

    Raises:
        BundleError: There is no bundle, it is not signed, a file is missing, altered or no plain file, or the manifest
            is of another format.
        RecipeError: `verify` cannot be read as a key.
    """
    path = folder / MANIFEST
    if not is_plain_file(path):
        why = f"it holds no {MANIFEST}, which an export writes last."
        fix = "run `dfq-deploy export … --out` on that folder; a run that was cut off goes on where it was."
        if _is_simulation(folder / "report.json"):
            why, fix = "it is a simulation, which has no engine.", "read its report.json, or export a bundle."
        raise BundleError(what=f"`{folder}` is not a bundle.", why=why, fix=fix)
    content = path.read_bytes() if path.stat().st_size <= _LARGEST else b""
    if verify is not None:
        signature = folder / SIGNATURE
        verifier(verify)(content, signature.read_bytes() if is_plain_file(signature) else None, str(folder))
    manifest = _manifest_in(content, path)
    for name, recorded in manifest.files.items():
        if engine or name not in manifest.engine.files:
            _hold_to_hash(folder, name, recorded, of_engine=name in manifest.engine.files)
    for name in manifest.files:
        if name.endswith(".onnx"):
            refuse_outside(folder / name, manifest.files)
    return manifest


def _is_simulation(report: Path) -> bool:
    try:
        return is_plain_file(report) and header_of(report.read_bytes()).get("simulated") is True
    except (OSError, ValueError):
        return False


def _manifest_in(content: bytes, path: Path) -> Manifest:
    """The manifest that the file `path` holds as `content`."""
    try:
        header = header_of(content)
        if why := newer(header, reads=_FORMAT, known=Manifest.model_fields):
            raise later(BundleError, path, why)
        manifest = Manifest.model_validate_json(content)
    except (ValueError, ImagesError) as cause:
        first = cause.errors()[0] if isinstance(cause, ValidationError) else None
        place = ".".join(map(str, first["loc"])) if first else ""
        if first and first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            raise later(
                BundleError, path, f"it has a field `{place}`, which format {_FORMAT} does not have."
            ) from cause
        raise BundleError(
            what=f"`{path}` cannot be read as a manifest of format {_FORMAT}.",
            why=f"{first['msg']} at `{place}`." if first else f"{cause}.",
            fix="export the model again; a manifest is not edited by hand.",
        ) from cause
    unnamed = [name for name in _ALWAYS if name not in manifest.files or name in manifest.engine.files]
    unnamed += [name for name in manifest.engine.files if name not in manifest.files]
    if unnamed:
        raise BundleError(
            what=f"`{path}` does not name {unnamed[0]}.",
            why="every bundle holds it, and what the manifest does not name is not verified.",
            fix="export the model again; a manifest is not edited by hand.",
        )
    return manifest


def _hold_to_hash(folder: Path, name: str, recorded: str, *, of_engine: bool) -> None:
    """Return if the file `name` is what the manifest records."""
    file = folder / name
    if is_plain_file(file) and sha256_of(file) == recorded:
        return
    there = file.is_symlink() or file.exists()
    state, why = "missing", "the manifest names it."
    if there:
        state, why = "altered", "the manifest records it with another content."
    if there and not is_plain_file(file):
        state, why = "no plain file", "a link, a pipe or a folder may lead out of the bundle."
    raise BundleError(
        what=f"`{file}` is {state}.",
        why=why,
        fix=f"build the engine again: dfq-deploy build {folder}"
        if of_engine
        else "copy the bundle again, whole, or export the model again.",
    )
