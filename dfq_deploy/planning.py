"""From a model and its calibration images to a plan: a student, rotated and folded weights, formats, corrections.

Comes after the images and before ONNX. Each step that changes weights leaves a file of them, and a later one starts
from what it left. A student that came with the images is the first of them.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from calibrators.blocks import reconstruct
from calibrators.errors import CalibrationWarning, ImagesError
from calibrators.images import ImageSet
from calibrators.plan import QParams, QuantPlan
from calibrators.refining import correct, kind_of, transform
from calibrators.rotating import rotate
from calibrators.scheme import SCHEMES
from calibrators.student import Student
from dfq_deploy.building import made_with
from dfq_deploy.choices import blocks_of, passes_of, scheme_of
from dfq_deploy.formats import Job, formats_of
from dfq_deploy.models import Model
from dfq_deploy.recipe import CalibrateRecipe
from dfq_deploy.refined import load_refined, load_scales, save_refined, save_weights, shared_copy_of

__all__ = ["plan_of", "student_for", "suited"]


def suited(recipe: CalibrateRecipe, images: ImageSet) -> CalibrateRecipe:
    """`recipe` for these images: a student that came with them has learned to be rounded as it is, with no passes."""
    return replace(recipe, refine="none") if images.student and recipe.refine == "default" else recipe


def student_for(model: Model, scheme: str, images: ImageSet) -> Student | None:
    """The student that came with `images`, which serves `model` in the scheme of that name; None if none came.

    Raises:
        ImagesError: It is for another model or other formats.
    """
    student = images.student
    if student is not None and (student.model, student.scheme) != (model.fingerprint, scheme):
        learned_for = student.scheme if student.model == model.fingerprint else "another model"
        raise ImagesError(
            what=f"the student that came with {images.source} learned for {learned_for}.",
            why=f"here are `{model.name}` and {scheme}, and what it learned serves only what it is for.",
            fix="make the images with the same --model, weights and --scheme, or take them without the student: "
            "dfq-deploy convert FILE --to folder.",
        )
    return student


def plan_of(job: Job) -> tuple[QuantPlan, Model, tuple[Path, ...]]:
    """The plan that the job's recipe asks for, the model with the weights that it is for, and the files of those.

    Where no pass is asked for the model is the job's, and there are no files.

    Raises:
        PlanError: A range is unusable, nothing is left to quantize, or a layer to spare does not exist.
        ImagesError: The student that came with the images is for another model or other formats.
    """
    job = replace(job, recipe=suited(job.recipe, job.images))
    recipe, model, images, work = job.recipe, job.model, job.images, job.work
    scheme, blocks, passes = scheme_of(recipe), blocks_of(recipe), passes_of(recipe)
    rotations, transforms, corrections, reconstructions = (
        [name for name in passes if kind_of(name) == kind] for kind in ("rotate", "transform", "correct", "reconstruct")
    )
    facts = [images.fingerprint, scheme.name, scheme.weight and scheme.weight.name, blocks, made_with()]
    refined, weights = _with_student(job)

    def fold(path: Path) -> None:
        folded = shared_copy_of(refined)
        idle = []
        if rotations and not rotate(folded.module, torch.from_numpy(images.pixels[:2]), rotations):
            idle += rotations
        if transforms and not transform(folded.module, images, transforms, scheme, blocks):
            idle += transforms
        if idle:
            warnings.warn(
                f"{' and '.join(idle)} changed nothing: this model has no place where they can.",
                CalibrationWarning,
                stacklevel=2,
            )
        save_refined(path, model, folded)

    if rotations or transforms:
        path = work.stage("folded", ".safetensors", [refined.fingerprint, [*rotations, *transforms], *facts], fold)
        weights.append(path)
        refined = load_refined(model, path)
    floats = refined  # rotated blocks are held against rotated ones
    plan = formats_of(replace(job, model=refined))
    if recipe.refine == "default" and any(qparams.block for qparams in plan.sites.values()):
        corrections = list(dict.fromkeys([*corrections, *SCHEMES["w4a16"].refine]))  # --auto may choose INT4

    def changed(
        stage: str, names: list[str], change: Callable[[Model], Mapping[str, QParams]]
    ) -> tuple[QuantPlan, Model]:
        def make(path: Path) -> None:
            copied = shared_copy_of(refined)
            sites = change(copied)
            save_refined(path, model, copied, sites)

        path = work.stage(stage, ".safetensors", [refined.fingerprint, plan.fingerprint, names, *facts], make)
        weights.append(path)
        found = load_refined(model, path)
        return replace(plan, sites=load_scales(path, plan.sites), model=found.fingerprint), found

    if corrections:
        plan, refined = changed(
            "refined", corrections, lambda copied: correct(copied.module, plan.sites, images, corrections)
        )
    if reconstructions:
        plan, refined = changed(
            "learned",
            reconstructions,
            lambda copied: reconstruct(
                copied.module, floats.module, plan.sites, images, reconstructions, job.watch.progress
            ),
        )
    return plan, refined, tuple(weights)


def _with_student(job: Job) -> tuple[Model, list[Path]]:
    """The job's model with the weights of the student that came with the images, and the file of those, if one did."""
    model, student = job.model, student_for(job.model, job.recipe.scheme, job.images)
    if student is None:
        return model, []
    facts = [model.fingerprint, student.fingerprint]
    path = job.work.stage("student", ".safetensors", facts, lambda path: save_weights(path, student.weights))
    return load_refined(model, path), [path]
