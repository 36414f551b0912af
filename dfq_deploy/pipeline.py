"""The stages, read top to bottom: model, images, ranges, plan, float ONNX, quantized ONNX, engine, check.

Each stage takes artefacts and gives an artefact. What is already done is the workspace's business, what is printed the
command line's. `export` runs them all; `generate`, `calibrate` and `check` are parts of it.
"""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from calibrators.errors import NotHereError, PlanError, RecipeError
from calibrators.files import clear_unfinished, written_whole
from calibrators.images import ImageSet
from calibrators.plan import QuantPlan
from calibrators.registry import pick
from dfq_deploy.analysis import Sensitivity, analyse
from dfq_deploy.building import build_bundle, is_built, made_with
from dfq_deploy.evaluate import Check, evaluate
from dfq_deploy.generation import GenerateOptions
from dfq_deploy.models import Model
from dfq_deploy.models.loading import load_model
from dfq_deploy.opening import (
    calibration_images,
    folded_again,
    images_to_check,
    labelled_for,
    load_again,
    open_images,
    refined_again,
)
from dfq_deploy.planning import blocks_of, check_recipe, float_stage, formats_for_spared, plan_of
from dfq_deploy.recipe import CalibrateRecipe, GenerateRecipe, ModelRecipe, Recipe
from dfq_deploy.reference import Reference
from dfq_deploy.workspace import Workspace
from exporters.backends import BuildOptions, Engine
from exporters.backends.ort import OrtEngine
from exporters.bundle import Manifest, open_bundle
from exporters.cast import widen
from exporters.to_onnx import save_model

__all__ = ["Watch", "calibrate", "check", "export", "generate", "sensitivity"]


class Watch(Protocol):
    """Who is told how a run goes."""

    def stage(self, name: str, already_done: bool) -> None:
        """A stage begins, or was done by an earlier run."""

    def progress(self, done: int, total: int, terms: Mapping[str, float]) -> None:
        """How far the stage is, with the current loss terms by name where there are any."""


class _Silent:
    def stage(self, name: str, already_done: bool) -> None:
        """Nobody is told."""

    def progress(self, done: int, total: int, terms: Mapping[str, float]) -> None:
        """Nobody is told."""


_SILENT = _Silent()


def export(
    recipe: Recipe,
    out: str | Path,
    *,
    images: str | None = None,
    limit: int | None = None,
    watch: Watch = _SILENT,
) -> Check:
    """Make the bundle that `recipe` describes in the folder `out`, and check its engine.

    Args:
        recipe: The run.
        out: The bundle's folder; finished stages of an earlier run in it are used again.
        images: What to check on (`folder:PATH`, `npz:PATH`, a file); see `check`.
        limit: Check on this many images, evenly spaced.
        watch: Told how it goes.

    Raises:
        DeployError: A stage could not be carried out; what was finished stays.
    """
    out = Path(out)
    check_recipe(recipe, recipe.options)  # told now if it cannot be, not after the images
    watch.stage("model", False)
    model = _load(recipe)
    if images is not None:
        labelled_for(model, open_images(images, model.preprocess))  # told now if it is wrong, not at the end
    with Workspace(out, watch.stage) as work:
        clear_unfinished(out)
        calibration = _calibration_images(recipe, model, work, watch)
        plan, refined, weights = plan_of(recipe, model, calibration, work, watch.progress)
        pick("exporters.backends", recipe.backend).check(plan, recipe.options)
        floats = float_stage(refined, work)
        if not is_built(out, recipe, plan):
            watch.stage("engine", False)
            build_bundle(out, recipe, model, refined, weights, plan=plan, images=calibration, floats=floats)
    return check(out, images=images, limit=limit, watch=watch, model=model)


def generate(recipe: GenerateRecipe, out: str | Path, *, watch: Watch = _SILENT) -> ImageSet:
    """Make synthetic images and write them to the file `out`.

    Raises:
        DeployError: The model cannot be loaded, the generator cannot work on it, or `out` cannot be written.
    """
    out = _writable(Path(out))
    watch.stage("model", False)
    model = _load(recipe)
    watch.stage("images", False)
    _generate(recipe, model, out, watch)
    return ImageSet.load(out)


def calibrate(recipe: CalibrateRecipe, out: str | Path, *, watch: Watch = _SILENT) -> QuantPlan:
    """Make a plan and write it to the file `out`; finished stages are kept beside it, in `work/`.

    Raises:
        DeployError: The model or the images cannot be had, their ranges are unusable, or `out` cannot be written.
    """
    out = _writable(Path(out))
    check_recipe(recipe, BuildOptions(provider=recipe.provider))
    watch.stage("model", False)
    model = _load(recipe)
    with Workspace(out.parent, watch.stage) as work:
        calibration = _calibration_images(recipe, model, work, watch)
        plan, _refined, _weights = plan_of(recipe, model, calibration, work, watch.progress)
        plan.save(out)
    return plan


def check(
    folder: str | Path,
    *,
    images: str | None = None,
    limit: int | None = None,
    checkpoint: Path | None = None,
    watch: Watch = _SILENT,
    model: Model | None = None,
) -> Check:
    """Compare the engine in `folder` with its reference and the float model, and write `folder/report.json`.

    Args:
        folder: A bundle.
        images: `folder:PATH`, `npz:PATH` or an ImageSet file. None: the labelled images that the model brings along
            (the demo does), else the images that the plan was calibrated on.
        limit: Use this many of them, evenly spaced.
        checkpoint: Where the weights lie now, if not where the export found them.
        watch: Told how it goes.
        model: The bundle's model, if it is loaded already.

    Raises:
        BundleError: The bundle is incomplete or altered, or the weights are others than it was made from.
        DeployError: The images cannot be had.
    """
    folder = Path(folder)
    manifest = open_bundle(folder)
    model = model or load_again(folder, manifest, checkpoint)
    picked = labelled_for(model, images_to_check(folder, manifest, model, images))
    picked = picked if limit is None else picked.spread(limit)
    watch.stage("check", False)
    plan = QuantPlan.load(folder / "plan.safetensors")
    engine, quantized, absent = _engine(folder, manifest)
    with contextlib.closing(engine):
        found = evaluate(
            Reference(refined_again(folder, manifest, model), plan, model),
            engine,
            picked,
            quantized=quantized,
            facts=manifest.engine,
            absent=absent,
            progress=lambda done, total: watch.progress(done, total, {}),
        )
    with written_whole(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(found.report(), indent=1), encoding="utf-8")
    return found


def sensitivity(
    folder: str | Path,
    *,
    images: str | None = None,
    limit: int = 16,
    checkpoint: Path | None = None,
    watch: Watch = _SILENT,
) -> Sensitivity:
    """Measure what quantizing each layer of the bundle in `folder` costs, on its reference.

    Args:
        folder: A bundle; its engine is not run.
        images: `folder:PATH`, `npz:PATH` or an ImageSet file, labelled or not. None: the images that the plan was
            calibrated on, or noise where those were synthetic and are gone.
        limit: Use this many of them, evenly spaced.
        checkpoint: Where the weights lie now, if not where the export found them.
        watch: Told how it goes.

    Raises:
        BundleError: The bundle is incomplete or altered, or the weights are others than it was made from.
        PlanError: The plan quantizes nothing.
        DeployError: The images cannot be had.
    """
    folder = Path(folder)
    manifest = open_bundle(folder)
    plan = QuantPlan.load(folder / "plan.safetensors")
    if not plan.sites:
        raise PlanError(
            what=f"there is nothing to measure in `{folder}`.",
            why=f"its scheme, {plan.scheme}, quantizes nothing.",
            fix="export the model with another --scheme.",
        )
    watch.stage("model", False)
    model = load_again(folder, manifest, checkpoint)
    found = open_images(images, model.preprocess) if images else calibration_images(folder, manifest, model)
    if found is None:
        found = pick("dfq_deploy.generation.generators", "noise").generate(model, GenerateOptions())
    watch.stage("layers", False)
    folded = folded_again(folder, manifest, model)
    placement = pick("exporters.backends", manifest.backend).placement(manifest.engine.options)
    return analyse(
        folded,
        plan,
        found.spread(limit),
        spared=formats_for_spared(plan, folded, folder / "work", blocks=blocks_of(placement, manifest.recipe["block"])),
        refined=refined_again(folder, manifest, model),
        progress=lambda done, total: watch.progress(done, total, {}),
    )


def _engine(folder: Path, manifest: Manifest) -> tuple[Engine, ir.Model, str | None]:
    """The engine, its ONNX model and None; where it cannot run here, ONNX Runtime as a stand-in, and why."""
    facts, path = manifest.engine, folder / "model.onnx"
    model = ir.load(path)
    if facts.options.body == "bf16":
        widen(model)  # ONNX Runtime's CPU provider has no bf16
    absent = facts.note
    if facts.state == "built":
        try:
            engine: Engine = pick("exporters.backends", manifest.backend).load(path, facts.made_for, facts.options)
        except NotHereError as error:
            absent = f"{error.what.removesuffix('.')}: {error.why}"
        else:
            return engine, model, None
    if facts.options.body != "bf16":
        return OrtEngine(path, "cpu", exact=True), model, absent
    with tempfile.TemporaryDirectory() as place:
        save_model(model, Path(place) / "model.onnx")
        return OrtEngine(Path(place) / "model.onnx", "cpu", exact=True), model, absent


def _writable(out: Path) -> Path:
    """`out`, which can become a file: found out before anyone waits for what goes into it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(out))
    except OSError as cause:
        raise RecipeError(
            what=f"`{out}` cannot be written.", why=f"{cause}.", fix="pass another file with --out."
        ) from cause
    return out


def _load(recipe: ModelRecipe) -> Model:
    return load_model(
        recipe.model, checkpoint=recipe.checkpoint, random_weights=recipe.random_weights, seed=recipe.seed
    )


def _generate(recipe: GenerateRecipe, model: Model, path: Path, watch: Watch) -> None:
    generator = pick("dfq_deploy.generation.generators", recipe.generator)
    options = GenerateOptions(count=recipe.count, seed=recipe.seed, exact=recipe.exact)
    generator.generate(model, options, progress=watch.progress).save(path)


def _calibration_images(recipe: CalibrateRecipe, model: Model, work: Workspace, watch: Watch) -> ImageSet:
    if recipe.calib != "synthetic":
        return open_images(recipe.calib, model.preprocess)
    facts = [
        recipe.generator,
        recipe.count,
        recipe.seed,
        recipe.exact,
        model.fingerprint,
        made_with(),
    ]
    path = work.stage("images", ".safetensors", facts, lambda path: _generate(recipe, model, path, watch))
    return ImageSet.load(path)
