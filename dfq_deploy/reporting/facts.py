"""All that a report shows of one bundle, gathered: what lies in its folder, what is measured, and what is missing."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from calibrators.errors import BundleError, DeployError, ImagesError
from calibrators.files import sha256_of
from calibrators.pictures import contact_sheet, pictures_on
from dfq_deploy.disagreements import DISAGREEMENTS
from dfq_deploy.models import Model
from dfq_deploy.opening import engine_bytes, float_model_in, open_images
from dfq_deploy.reporting.checked import Audited, Checked, Gate, Sensed, read_check, read_gate
from dfq_deploy.reporting.drawing import data_uri
from dfq_deploy.reporting.measuring import FLOAT, Latency, audited, measure_latency, sensitivities
from dfq_deploy.reporting.repeating import neutral
from dfq_deploy.watch import Watch
from exporters.bundle import Manifest, open_bundle

__all__ = ["Missing", "Options", "Run", "gather", "missing_for", "timed", "without_float"]

_SHEET, _THUMBNAIL = 1100, 160  # pixels, longest side
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Options:
    """How a report is made.

    Attributes:
        checkpoint: Where the weights lie now.
        quick: Show only what lies there already; measure nothing but time.
        model: The model, where `wrap` made it.
    """

    checkpoint: Path | None = None
    quick: bool = False
    model: Model | None = None


@dataclass(frozen=True)
class Missing:
    """A section, or a part of one, that the report does not have.

    Attributes:
        section: What would be there.
        why: Why it is not.
        fix: How to get it.
    """

    section: str
    why: str
    fix: str


@dataclass(frozen=True)
class Run:
    """One bundle, as a report shows it; None is what could not be had.

    Attributes:
        name: Name of its folder.
        folder: The folder.
        manifest: Its manifest.
        classes: What each logit stands for.
        engine_bytes: Size of what is deployed to run it.
        float_bytes: Size of the float model.
        checked: The last check.
        gate: What the gate found.
        sensed: What each layer costs.
        audit: How its images calibrate.
        sheet: The calibration images as a data URI, with how many there are and where they come from.
        thumbnails: Pictures of the check's disagreements, in their order.
        latency: How long calls take.
        missing: What is left out.
    """

    name: str
    folder: Path
    manifest: Manifest
    classes: tuple[str, ...]
    engine_bytes: int
    float_bytes: int | None
    checked: Checked | None
    gate: Gate | None
    sensed: Sensed | None
    audit: Audited | None
    sheet: tuple[str, int, str] | None
    thumbnails: tuple[str, ...]
    latency: tuple[Latency, ...] = ()
    missing: tuple[Missing, ...] = ()

    def lacking(self, section: str, error: DeployError) -> "Run":
        """The run with a section named as missing."""
        return replace(self, missing=(*self.missing, missing_for(section, error)))

    def class_name(self, index: int | None) -> str:
        """What a class is called; its number where that is not known."""
        if index is None:
            return ""
        return self.classes[index] if index < len(self.classes) else f"class {index}"


def gather(folder: Path, options: Options, watch: Watch) -> Run:
    """The bundle in `folder`, all but its time.

    Raises:
        BundleError: There is no bundle, or it is altered.
    """
    manifest = open_bundle(folder)
    missing: list[Missing] = []

    def have(section: str, find: Callable[[], _Found]) -> _Found | None:
        try:
            return find()
        except DeployError as error:
            missing.append(missing_for(section, error))
            return None

    given: dict[str, Any] = {**vars(options), "watch": watch}
    if options.model and options.model.fingerprint != manifest.model.fingerprint:  # it is the other bundle's
        given["model"] = None
    if not manifest.engine.precision:
        missing.append(missing_for("What each layer is computed in", _unseen(folder, manifest)))
    checked = have("Verdict, accuracy and agreement", lambda: read_check(folder))
    named = folder / "classes.txt" if "classes.txt" in manifest.files else None
    floats = float_model_in(folder)
    thumbnails = have("Pictures of the disagreements", lambda: _thumbnails(folder, manifest, checked))
    return Run(
        name=folder.resolve().name,
        folder=folder,
        manifest=manifest,
        classes=tuple(named.read_text(encoding="utf-8", errors="replace").splitlines()) if named else (),
        engine_bytes=engine_bytes(folder, manifest),
        float_bytes=_with_data(floats) if floats else None,
        checked=checked,
        gate=have("The gate", lambda: read_gate(folder)) if (folder / "gate.json").is_file() else None,
        sheet=have("Calibration images", lambda: _sheet(folder, manifest)),
        audit=have("Audit of the calibration images", lambda: audited(folder, manifest, **given)),
        sensed=have("Which layers hurt", lambda: sensitivities(folder, manifest, **given)),
        thumbnails=tuple(thumbnails or ()),
        missing=tuple(missing),
    )


def timed(run: Run, watch: Watch) -> Run:
    """The run with the time that its engine takes."""
    try:
        latency = tuple(measure_latency({"engine": run.folder}, run.manifest, watch))
    except DeployError as error:
        return run.lacking("Time", error)
    run = replace(run, latency=latency)
    if FLOAT in latency[0].milliseconds:
        return run
    return run.lacking("Time against float", without_float(run))


def without_float(run: Run) -> BundleError:
    """Why there is no float model to time or to weigh an engine against."""
    if run.float_bytes is not None:
        return BundleError(
            what="the float model was not timed.",
            why="it runs in ONNX Runtime on a CPU, and the engine elsewhere.",
            fix="compare with a bundle of `--scheme float` for the same run-time.",
        )
    return BundleError(
        what="there is no float model to compare with.",
        why=f"neither `{run.name}/float.onnx` nor `{run.name}/work` is here.",
        fix="run the report where the export ran, or export with --keep-float.",
    )


def _unseen(folder: Path, manifest: Manifest) -> BundleError:
    return BundleError(
        what="nobody has seen it.",
        why=manifest.engine.note or "the run-time does not say.",
        fix=f"build the engine where it will run: dfq-deploy build {folder.name}.",
    )


def _with_data(model: Path) -> int:
    """Size of an ONNX model and the weights beside it."""
    weights = model.with_name(f"{model.name}.data")
    return sum(file.stat().st_size for file in (model, weights) if file.is_file())


def _sheet(folder: Path, manifest: Manifest) -> tuple[str, int, str]:
    source = manifest.images.get("source", "")
    if not all(part.startswith("synthetic") for part in source.split(" and ")):
        raise BundleError(
            what="the calibration images are not shown.",
            why=f"they are no synthetic ones but {source}, and may not be for everyone to see.",
            fix="nothing: synthetic ones are shown.",
        )
    calib, where = str(manifest.recipe["calib"]), f"{folder.name}/work"
    places = [str(path) for path in sorted((folder / "work").glob("images-*.safetensors"))]
    if calib != "synthetic":
        places, where = [calib], neutral(calib)
    for place in places:
        with contextlib.suppress(ImagesError):  # gone, or others by now
            images = open_images(place, manifest.preprocess)
            if images.fingerprint == manifest.images.get("fingerprint"):
                return data_uri(contact_sheet(images), _SHEET), len(images), images.source
    raise BundleError(
        what="the calibration images are not here.",
        why=f"they lay in `{where}`, which is not deployed.",
        fix="run the report where the export ran.",
    )


def _thumbnails(folder: Path, manifest: Manifest, checked: Checked | None) -> list[str]:
    """Pictures of the disagreements that `checked` names.

    Raises:
        BundleError: They are gone, or of another check.
    """
    if checked is None or not checked.disagreements:
        return []
    path = folder / DISAGREEMENTS
    try:
        if checked.of.get(path.name) != sha256_of(path):
            raise BundleError(
                what="the pictures are of another check.",
                why=f"`{folder.name}/{DISAGREEMENTS.as_posix()}` differs from what report.json names.",
                fix=f"run `dfq-deploy check {folder.name}` again.",
            )
        with Image.open(path) as sheet:
            cells = pictures_on(sheet, len(checked.disagreements), manifest.preprocess.size)
    except (OSError, Image.DecompressionBombError) as cause:
        raise BundleError(
            what="the pictures are not here.",
            why=f"a check puts them into `{folder.name}/work`, which is not deployed.",
            fix="run the report where the check ran.",
        ) from cause
    return [data_uri(cell, _THUMBNAIL) for cell in cells]


def missing_for(section: str, error: DeployError) -> Missing:
    """What is missing because of `error`."""
    return Missing(section, f"{_sentence(error.what)} {_sentence(error.why)}", _sentence(error.fix))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"
