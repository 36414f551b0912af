"""Calibration images of a run: opened where they lie, or made, once, by the generators that the recipe names.

What was made lies in a file with pictures beside it: a contact sheet and, but for noise, what the model sees in the
images. A synthesis that was killed goes on with the batches that are missing.
"""

import shutil
from dataclasses import asdict
from pathlib import Path

from calibrators.images import ImageSet
from calibrators.pictures import seen_beside, write_contact_sheet
from calibrators.registry import pick
from dfq_deploy.building import made_with
from dfq_deploy.formats import FormatsOf
from dfq_deploy.generation import Elsewhere, GenerateOptions
from dfq_deploy.generation.device import device_named
from dfq_deploy.generation.generators import STUDENTS
from dfq_deploy.generation.making import make_images
from dfq_deploy.models import Model
from dfq_deploy.opening import open_images
from dfq_deploy.recipe import CalibrateRecipe, GenerateRecipe, note_unused
from dfq_deploy.watch import Watch
from dfq_deploy.workspace import Workspace

__all__ = ["batches_beside", "images_for", "write_images"]


def images_for(recipe: CalibrateRecipe, model: Model, work: Workspace, watch: Watch) -> ImageSet:
    """The images that `recipe` calibrates on: opened, or made unless an earlier run has.

    Raises:
        DeployError: They cannot be had.
    """
    if recipe.calib != "synthetic":
        note_unused(recipe, ("count", "exact", "first"), f"with --calib {recipe.calib}")
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
    if set(STUDENTS) & set(recipe.generator.split(",")):
        facts += FormatsOf(recipe).facts
    path = work.stage("images", ".safetensors", facts, lambda path: write_images(recipe, model, path, watch))
    return ImageSet.load(path)


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
    options = GenerateOptions(
        count=recipe.count,
        first=recipe.first,
        seed=recipe.seed,
        exact=recipe.exact,
        formats=FormatsOf(whole),
        keep_in=batches,
        device=device_named(recipe.device),
        elsewhere=elsewhere,
    )
    images = make_images(recipe.generator.split(","), model, options, progress=watch.progress)
    for picture in seen_beside(path):  # of earlier images
        picture.unlink(missing_ok=True)
    write_contact_sheet(images, path)
    images.save(path)  # from here on the stage is done
    if set(recipe.generator.split(",")) != {"noise"}:
        for picture, why in pick("dfq_deploy", "looking").draw_beside(path, model, images).items():
            watch.tell(f"no {picture.name}: {why}")
    shutil.rmtree(batches, ignore_errors=True)


def batches_beside(path: Path) -> Path:
    """The folder of finished batches, while the images in the file `path` are made."""
    return path.with_name(f"{path.name}.batches")
