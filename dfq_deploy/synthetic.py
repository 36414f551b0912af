"""Calibration images of a run: opened where they lie, or made, once, by the generators that the recipe names.

What was made lies in a file with pictures beside it: a contact sheet and, but for noise, what the model sees in the
images. A synthesis that was killed goes on with the batches that are missing.
"""

import contextlib
import functools
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calibrators.errors import ImagesError
from calibrators.files import fingerprint_of
from calibrators.images import ImageSet
from calibrators.pictures import seen_beside, write_contact_sheet
from dfq_deploy.building import made_with
from dfq_deploy.charts.attention import plot_attention
from dfq_deploy.charts.similarity import plot_similarity
from dfq_deploy.coverage import NOISE, OWN
from dfq_deploy.formats import FORMAT_FIELDS, formats_on
from dfq_deploy.generation import Elsewhere, GenerateOptions
from dfq_deploy.generation.device import device_named
from dfq_deploy.generation.generators import STUDENTS
from dfq_deploy.generation.making import make_images, noise_like
from dfq_deploy.generation.seen import attention_maps, similarity_histograms
from dfq_deploy.models import Model
from dfq_deploy.opening import open_images
from dfq_deploy.recipe import CalibrateRecipe, GenerateRecipe
from dfq_deploy.watch import Watch
from dfq_deploy.workspace import Workspace

__all__ = ["batches_beside", "images_for", "write_images"]

_LOOKED_AT = 32  # images whose patches are compared, evenly spaced


def images_for(recipe: CalibrateRecipe, model: Model, work: Workspace, watch: Watch) -> ImageSet:
    """The images that `recipe` calibrates on: opened, or made unless an earlier run has.

    Raises:
        DeployError: They cannot be had.
    """
    if recipe.calib != "synthetic":
        return open_images(recipe.calib, model.preprocess)
    facts = [
        recipe.generator,
        recipe.count,
        recipe.first,
        recipe.seed,
        recipe.exact,
        str(device_named(recipe.device)),
        model.fingerprint,
        made_with(),
    ]
    if _has_student(recipe):
        facts += _formats_of(recipe)
    path = work.stage("images", ".safetensors", facts, lambda path: write_images(recipe, model, path, watch))
    return ImageSet.load(path)


def _has_student(recipe: GenerateRecipe) -> bool:
    return bool(set(STUDENTS) & set(recipe.generator.split(",")))


def _formats_of(recipe: CalibrateRecipe) -> list[Any]:
    """What decides on what a student learns for."""
    return [getattr(recipe, name) for name in FORMAT_FIELDS]


def write_images(
    recipe: GenerateRecipe, model: Model, path: Path, watch: Watch, *, elsewhere: Elsewhere | None = None
) -> None:
    """Make the images that `recipe` describes, and write them to `path`, pictures of them beside it.

    Args:
        recipe: What is asked for.
        model: The model.
        path: The file; finished batches are kept beside it, in the folder `batches_beside` names.
        watch: Told how it goes.
        elsewhere: Who has batches made on other machines, or None.

    Raises:
        DeployError: The generator cannot work on the model, or broke down.
    """
    whole = recipe if isinstance(recipe, CalibrateRecipe) else CalibrateRecipe(**asdict(recipe))
    batches = batches_beside(path)  # what a run that was killed left is taken up
    learns_for = fingerprint_of(_formats_of(whole)) if _has_student(recipe) else ""
    options = GenerateOptions(
        count=recipe.count,
        first=recipe.first,
        seed=recipe.seed,
        exact=recipe.exact,
        formats=functools.partial(formats_on, whole),
        keep_in=batches / learns_for[:16],
        device=device_named(recipe.device),
        elsewhere=elsewhere,
    )
    images = make_images(recipe.generator.split(","), model, options, progress=watch.progress)
    write_contact_sheet(images, path)
    _draw_what_is_seen(model, images, path)
    images.save(path)  # last: from here on the stage is done
    shutil.rmtree(batches, ignore_errors=True)


def _draw_what_is_seen(model: Model, images: ImageSet, path: Path) -> None:
    """Draw patch similarity, beside that of noise, and attention, with its priors; not what a model does not have."""
    similarity, attention = seen_beside(path)
    title = f"{model.name}: {len(images)} images, {images.source}"
    few = images.spread(_LOOKED_AT)
    draw: dict[Path, Callable[[], None]] = {
        similarity: lambda: plot_similarity(
            similarity_histograms(model, {OWN: few, NOISE: noise_like(few, model)}), title, similarity
        ),
        attention: lambda: plot_attention(attention_maps(model, images), title, images.preprocess, attention),
    }
    for picture, plot in draw.items():
        picture.unlink(missing_ok=True)  # of earlier images
        if images.source != "synthetic:noise":
            with contextlib.suppress(ImagesError):
                plot()


def batches_beside(path: Path) -> Path:
    """The folder of finished batches, while the images in the file `path` are made."""
    return path.with_name(f"{path.name}.batches")
