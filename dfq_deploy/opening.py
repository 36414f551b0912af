"""What a bundle names, opened again: its model, its engine, and the images to run on it.

Comes before whatever compares something on a finished bundle. The bundle itself is opened by `exporters.bundle`.
"""

import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from calibrators.errors import BundleError, CalibrationWarning, ImagesError, ModelError, NotHereError
from calibrators.images import ImageSet, joined
from calibrators.preprocess import Preprocess
from calibrators.registry import names, pick
from dfq_deploy.models import Model
from dfq_deploy.models.loading import load_model
from dfq_deploy.recipe import size_of
from dfq_deploy.refined import load_refined
from exporters.backends import Engine
from exporters.bundle import Manifest
from exporters.cast import widen
from exporters.ort_engine import OrtEngine
from exporters.to_onnx import save_model

__all__ = [
    "calibration_images",
    "engine_again",
    "engine_bytes",
    "float_model_in",
    "folded_again",
    "images_to_check",
    "images_to_judge_by",
    "load_again",
    "open_images",
    "refined_again",
]


def load_again(folder: Path, manifest: Manifest, checkpoint: Path | None, model: Model | None = None) -> Model:
    """The model of the bundle in `folder`, its weights from `checkpoint` or from where the export found them.

    One that came from `wrap` nobody can load by its name: it has to be given as `model`.

    Raises:
        ModelError: The weights cannot be had, or no model was given where one has to be.
        BundleError: They are others than the bundle was made from.
    """
    facts = manifest.model
    if model is None and facts.wrapped:
        raise ModelError(
            what=f"`{folder}` was made of a module from Python, `{facts.name}`, which no name leads to.",
            why="engine and float model are compared by running both; running the engine alone needs no module.",
            fix="do this from Python: dfq_deploy.check(FOLDER, model=dfq_deploy.wrap(module, example, task=…)), or "
            "gate, sensitivity, report.",
        )
    if model is None:
        recorded = None if facts.checkpoint is None else Path(facts.checkpoint)
        model = load_model(
            facts.name,
            checkpoint=checkpoint or recorded,
            random_weights=facts.random_weights,
            seed=facts.seed,
            size=size_of(str(manifest.recipe.get("size", ""))),
        )
    if model.fingerprint != facts.fingerprint:
        raise BundleError(
            what=f"these are not the weights that `{folder}` was made from.",
            why="the fingerprint of the model differs from the manifest's.",
            fix="pass the module that it was made of, for the same task."
            if facts.wrapped
            else "pass the right file with --checkpoint.",
        )
    return model


def refined_again(folder: Path, manifest: Manifest, model: Model) -> Model:
    """`model` with the weights that the bundle's engine has: those of a student, or that refine passes gave it.

    Raises:
        BundleError: The file with these weights is gone, damaged or of another model.
    """
    refined = manifest.model.refined
    return load_refined(model, folder / "work" / refined[-1]) if refined else model


def folded_again(folder: Path, manifest: Manifest, model: Model) -> Model:
    """`model` with the weights before any correction: as float, but for a student's and the transforms.

    Raises:
        BundleError: The file with these weights is gone, damaged or of another model.
    """
    folded = [name for name in manifest.model.refined if name.startswith(("student-", "folded-"))]
    return load_refined(model, folder / "work" / folded[-1]) if folded else model


def engine_again(
    folder: Path, manifest: Manifest, *, threads: int | None = None
) -> tuple[Engine, ir.Model, str | None]:
    """The engine, its ONNX model and None; where it cannot run here, ONNX Runtime as a stand-in, and why.

    ONNX Runtime computes a call with so many `threads`, or as many as it wants; on a GPU nobody does.
    """
    facts, path = manifest.engine, folder / "model.onnx"
    model = ir.load(path)
    if facts.options.body == "bf16":
        widen(model)  # ONNX Runtime's CPU provider has no bf16
    absent = facts.note
    if facts.state == "built":
        try:
            on_cpu = manifest.backend == "ort" and facts.options.provider == "cpu"
            engine: Engine = pick("exporters.backends", manifest.backend).load(
                path, facts.made_for, facts.options, threads=threads if on_cpu else None
            )
        except NotHereError as error:
            absent = f"{error.what.removesuffix('.')}: {error.why}"
        else:
            return engine, model, None
    if facts.options.body != "bf16":
        return OrtEngine(path, "cpu", exact=True, threads=threads), model, absent
    with tempfile.TemporaryDirectory() as place:
        save_model(model, Path(place) / "model.onnx")
        return OrtEngine(Path(place) / "model.onnx", "cpu", exact=True, threads=threads), model, absent


def engine_bytes(folder: Path, manifest: Manifest) -> int:
    """Size of what the run-time loads: the engine's own files, or `model.onnx` with its data."""
    names = manifest.engine.files or [name for name in manifest.files if name.startswith("model.onnx")]
    return sum((folder / name).stat().st_size for name in names)


def float_model_in(folder: Path) -> Path | None:
    """The float ONNX model that lies in the bundle or in its `work`; None where neither does."""
    found = [folder / "float.onnx", *sorted((folder / "work").glob("float-*.onnx"))]
    return next((path for path in found if path.is_file()), None)


def open_images(place: str, preprocess: Preprocess) -> ImageSet:
    """The images at `folder:PATH`, `npz:PATH`, in an ImageSet file, or in several such files with commas between them.

    Raises:
        ImagesError: There are none, or they were made for another model.
    """
    kind, colon, path = place.partition(":")
    if colon and kind in names("calibrators.sources"):
        images: ImageSet = pick("calibrators.sources", kind).open_images(Path(path), preprocess)
        return images
    if not Path(place).is_file():
        parts = place.split(",")
        if len(parts) > 1:
            return joined([open_images(part, preprocess) for part in parts])
        raise ImagesError(
            what=f"`{place}` names no images.",
            why=f"it is neither a file nor one of {', '.join(f'{k}:PATH' for k in names('calibrators.sources'))}.",
            fix=f"pass --generator {place} with --calib synthetic."
            if place in names("dfq_deploy.generation.generators")
            else "check the path.",
        )
    images = ImageSet.load(Path(place))
    if images.preprocess != preprocess:
        raise ImagesError(
            what=f"the images in `{place}` were made for another model.",
            why=f"they have {images.preprocess}, the model takes {preprocess}.",
            fix="make them with the same --model.",
        )
    return images


def images_to_judge_by(model: Model, place: str | None) -> ImageSet | None:
    """The images at `place`; without one the labelled images that `model` brings along, or None.

    Raises:
        ImagesError: They cannot be had, or a label is no class of the model.
    """
    if place is None and model.labelled is not None:
        place = f"npz:{model.labelled}"
    return None if place is None else _labelled_for(model, open_images(place, model.preprocess))


def images_to_check(folder: Path, manifest: Manifest, model: Model, place: str | None) -> ImageSet:
    """The images at `place`; without one the labelled images of `model`, else those that it was calibrated on.

    Raises:
        ImagesError: They cannot be had, or a label is no class of the model.
    """
    images = images_to_judge_by(model, place)
    if images is not None:
        return images
    images = calibration_images(folder, manifest, model)
    if images is None:
        raise ImagesError(
            what="there are no images to check on.",
            why=f"the synthetic ones that it was calibrated on are not in `{folder / 'work'}` any more.",
            fix="pass --images folder:PATH, or a file made by `dfq-deploy generate`.",
        )
    return _labelled_for(model, images)


def calibration_images(folder: Path, manifest: Manifest, model: Model) -> ImageSet | None:
    """The images that the bundle in `folder` was calibrated on; None where they were synthetic and are gone.

    Raises:
        ImagesError: They are elsewhere and cannot be had, or are others by now.
    """
    calib, wanted = str(manifest.recipe["calib"]), manifest.images["fingerprint"]
    if calib == "synthetic":
        kept = (open_images(str(path), model.preprocess) for path in (folder / "work").glob("images-*.safetensors"))
        return next((images for images in kept if images.fingerprint == wanted), None)
    images = open_images(calib, model.preprocess)
    if images.fingerprint != wanted:
        raise ImagesError(
            what=f"the images at `{calib}` are not those that `{folder}` was calibrated on.",
            why="their fingerprint differs from the manifest's.",
            fix="put back what lay there, or pass --images.",
        )
    return images


def _labelled_for(model: Model, images: ImageSet) -> ImageSet:
    """`images` with labels that are classes of `model`, or with none.

    There are none where it is no classifier; and, which a note says, where a label is the place of a sub-folder among
    more or fewer of them than the model has classes.

    Raises:
        ImagesError: A label is no class of it.
    """
    if model.task != "classification":
        return replace(images, labels=None)
    if images.classes is not None and len(images.classes) != model.classes:
        told = f"{images.source} has {len(images.classes)} sub-folders, and `{model.name}` {model.classes} classes"
        way_out = "a labels.csv (file,label) in the folder would say which is which."
        warnings.warn(f"{told}: no accuracy is measured; {way_out}", CalibrationWarning, stacklevel=2)
        return replace(images, labels=None)
    if images.labels is not None and not 0 <= images.labels.min() <= images.labels.max() < model.classes:
        raise ImagesError(
            what=f"{images.source} has labels from {images.labels.min()} to {images.labels.max()}.",
            why=f"`{model.name}` has {model.classes} classes, counted from 0.",
            fix="use images of the classes that the model was trained on, or drop their labels.",
        )
    return images
