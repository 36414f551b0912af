"""The audit of calibration images: what they are compared with, and what goes into the folder of its results.

Comes between images and a calibration, or after an export, on its bundle. How sets are compared is `coverage`'s
business, the verdict `audited`'s, and what is drawn that of `charts`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from calibrators.errors import BundleError, ImagesError, RecipeError
from calibrators.files import write_json
from calibrators.images import ImageSet
from calibrators.preprocess import Preprocess
from dfq_deploy.audited import REAL, SEED, Audit, judged
from dfq_deploy.building import made_with
from dfq_deploy.charts.ranges import plot_ranges
from dfq_deploy.coverage import NOISE, OWN, check_scheme, coverage, observer_used
from dfq_deploy.generation.making import (
    made_with_next_seed,
    noise_like,
    parts_of,
    refuse_degenerate,
    why_no_next_seed,
)
from dfq_deploy.looking import draw_seen
from dfq_deploy.models import Model
from dfq_deploy.models.loading import model_of
from dfq_deploy.opening import calibration_images, folded_again, load_again, open_images
from dfq_deploy.planning import student_for
from dfq_deploy.recipe import AuditRecipe, CalibrateRecipe
from dfq_deploy.refined import with_weights
from dfq_deploy.watch import SILENT, Watch, counting
from dfq_deploy.workspace import Workspace
from exporters.archive import bundle_folder, is_archive
from exporters.bundle import Manifest, open_bundle

__all__ = ["audit", "audit_against_noise"]


@dataclass(frozen=True)
class _Subject:
    """What is audited: images, the model that they are for, that model as it is calibrated, and what decides ranges."""

    images: ImageSet
    model: Model
    calibrated: Model
    formats: CalibrateRecipe


def audit(
    place: str | Path,
    recipe: AuditRecipe,
    out: str | Path,
    *,
    verify: str | Path | None = None,
    watch: Watch = SILENT,
) -> Audit:
    """Compare the ranges that calibration images give with those of noise, of another seed and of real images.

    Args:
        place: The images, as `--calib` takes them (`folder:PATH`, `npz:PATH`, a file), or a bundle's folder or a zip
            archive of it.
        recipe: The model and what to compare with.
        out: Folder of `audit.json` and the pictures; images of another seed are kept in its `work/`.
        verify: PEM file with the public key that the bundle must be signed with.
        watch: Told how it goes.

    Raises:
        DeployError: Images or model cannot be had, the images are degenerate, or the scheme needs no ranges.
    """
    watch.stage("model", False)
    path = Path(place)
    if path.is_dir() or is_archive(path):
        with bundle_folder(path) as folder:
            return _audited(_of_bundle(folder, recipe, verify), recipe, Path(out), watch=watch)
    if verify is not None:
        raise RecipeError(
            what=f"--verify means nothing to `{place}`.",
            why="bundles are signed, images are not.",
            fix="leave it out, or pass a bundle.",
        )
    return _audited(_of_images(str(place), recipe), recipe, Path(out), watch=watch)


def _audited(subject: _Subject, recipe: AuditRecipe, out: Path, *, watch: Watch) -> Audit:
    images, model = subject.images, subject.model
    if parts_of(images) or images.source.startswith("synthetic:"):
        refuse_degenerate(images.source.replace("synthetic:", ""), images)
    real = _real(recipe, model.preprocess)
    with Workspace(out, watch.stage) as work:
        others, absent = _others(images, real, model, work, watch)
        watch.stage("ranges", False)
        found = _compared(subject, others, absent, watch)
        watch.stage("pictures", False)
        (out / "audit.json").unlink(missing_ok=True)  # of other pictures
        found = _drawn(found, model, images, {name: those for name, those in others.items() if name != SEED}, out)
        write_json(out / "audit.json", found.report())
    return found


def audit_against_noise(
    folder: Path, *, checkpoint: Path | None = None, model: Model | None = None, watch: Watch = SILENT
) -> Audit:
    """Compare the images that the bundle in `folder` was calibrated on with noise alone; nothing is written or drawn.

    Args:
        folder: The bundle.
        checkpoint: Where the weights lie now.
        model: The model, where `wrap` made it.
        watch: Told how it goes.

    Raises:
        DeployError: Images or weights cannot be had, or the scheme needs no ranges.
    """
    subject = _of_bundle(folder, AuditRecipe(checkpoint=checkpoint), None, model)
    absent = {SEED: "another seed takes as long as the images took", REAL: "none were given"}
    return _compared(subject, {NOISE: noise_like(subject.images, subject.model)}, absent, watch)


def _compared(subject: _Subject, others: Mapping[str, ImageSet], absent: Mapping[str, str], watch: Watch) -> Audit:
    sites = tuple(coverage(subject.calibrated, subject.formats, subject.images, others, progress=counting(watch)))
    against, level, verdict = judged(sites)
    return Audit(
        model=subject.model.name,
        scheme=subject.formats.scheme,
        backend=subject.formats.backend,
        observer=observer_used(subject.formats),
        n=len(subject.images),
        images=subject.images.source,
        of={"images": subject.images.fingerprint, "model": subject.model.fingerprint},
        others={name: f"{len(those)} of {those.source}" for name, those in others.items()},
        absent=absent,
        sites=sites,
        held_against=against,
        level=level,
        verdict=verdict,
    )


def _others(
    images: ImageSet, real: ImageSet | None, model: Model, work: Workspace, watch: Watch
) -> tuple[dict[str, ImageSet], dict[str, str]]:
    """What `images` are compared with, and why something is missing, each by name."""
    others = {NOISE: noise_like(images, model)}
    absent = {} if real else {REAL: "none were given (--real)"}
    if why := why_no_next_seed(images, model):
        absent[SEED] = why
    else:
        others[SEED] = _other_seed(images, model, work, watch)
    return others | ({REAL: real} if real else {}), absent


def _real(recipe: AuditRecipe, preprocess: Preprocess) -> ImageSet | None:
    """As many of the real images as are looked at, under the name of all of them; None where there are none."""
    if recipe.real is None:
        return None
    opened = open_images(recipe.real, preprocess)
    return replace(opened.spread(recipe.limit), source=opened.source)


def _of_images(place: str, recipe: AuditRecipe) -> _Subject:
    if not recipe.model:
        raise RecipeError(
            what="--model is missing.",
            why=f"`{place}` is not a bundle, which would know the model that its images are for.",
            fix="pass --model NAME and, if it is not timm's, --checkpoint FILE.",
        )
    model = model_of(recipe)
    images = open_images(place, model.preprocess)
    scheme = recipe.scheme or (images.student.scheme if images.student else "w8a8")
    check_scheme(scheme)
    formats = CalibrateRecipe(model=recipe.model, scheme=scheme, spare="massive")
    return _Subject(images, model, _with_student(model, scheme, images), formats)


def _of_bundle(folder: Path, recipe: AuditRecipe, verify: str | Path | None, model: Model | None = None) -> _Subject:
    if recipe.model or recipe.random_weights or recipe.size or recipe.seed:
        raise RecipeError(
            what=f"--model, --random-weights, --size and --seed mean nothing to `{folder}`.",
            why="a bundle knows the model that it was made from.",
            fix="leave them out, or name a file of images.",
        )
    manifest = open_bundle(folder, verify=verify)
    model = load_again(folder, manifest, recipe.checkpoint, model)
    images = calibration_images(folder, manifest, model)
    if images is None:
        raise ImagesError(
            what=f"the images that `{folder}` was calibrated on are gone.",
            why="they were synthetic and lay in its work/.",
            fix="make them again with `dfq-deploy generate`, and audit that file.",
        )
    scheme = recipe.scheme or manifest.scheme
    check_scheme(scheme)
    student_for(model, scheme, images)
    return _Subject(images, model, folded_again(folder, manifest, model), _formats_of(manifest, scheme))


def _formats_of(manifest: Manifest, scheme: str) -> CalibrateRecipe:
    """What the bundle was calibrated by, with `scheme`."""
    known = {field.name for field in fields(CalibrateRecipe)} - {"checkpoint"}
    asked = {name: value for name, value in manifest.recipe.items() if name in known}
    try:
        own = CalibrateRecipe(**asked)
    except TypeError as cause:
        raise BundleError(
            what="the manifest's recipe cannot be read.", why=f"{cause}.", fix="export the model again."
        ) from cause
    return own if scheme == own.scheme else replace(own, scheme=scheme, auto=False)


def _with_student(model: Model, scheme: str, images: ImageSet) -> Model:
    """The model that a calibration on `images` would calibrate.

    Raises:
        ImagesError: The student that came with them is for another model or other formats.
    """
    student = student_for(model, scheme, images)
    if student is None:
        return model
    weights = {name: torch.from_numpy(value) for name, value in student.weights.items()}
    return with_weights(model, weights, f"the student that came with {images.source}")


def _other_seed(images: ImageSet, model: Model, work: Workspace, watch: Watch) -> ImageSet:
    def make(path: Path) -> None:
        made_with_next_seed(images, model, progress=watch.progress).save(path)

    facts = [dict(images.made_by), model.fingerprint, made_with()]
    return ImageSet.load(work.stage("seed", ".safetensors", facts, make))


def _drawn(found: Audit, model: Model, images: ImageSet, others: dict[str, ImageSet], out: Path) -> Audit:
    """Draw into `out` what can be drawn, and say what cannot."""
    plot_ranges(found, out / "ranges.png")
    seen = [out / "patch_similarity.png", out / "attention.png"]
    missing = draw_seen(model, images, {OWN: images, **others}, *seen)
    drawn = ("ranges.png", *(picture.name for picture in seen if picture not in missing))
    left_out: dict[str, list[str]] = {}
    for picture, why in missing.items():
        left_out.setdefault(why, []).append(picture.name)
    notes = tuple(f"no {' and no '.join(names)}: {why}" for why, names in left_out.items())
    return replace(found, pictures=drawn, left_out=notes)
