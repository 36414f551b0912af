"""The stages, read top to bottom: model, images, ranges, plan, float ONNX, quantized ONNX, engine, check.

Each stage takes artefacts and gives an artefact. What is already done is the workspace's business, what is printed the
command line's. `export` runs them all; `generate`, `calibrate` and `check` are parts of it.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from calibrators.errors import BundleError
from calibrators.files import clear_unfinished, writable, write_json
from calibrators.images import ImageSet
from calibrators.plan import QuantPlan
from calibrators.registry import pick
from dfq_deploy.building import build_bundle, float_stage, is_built
from dfq_deploy.choices import check_calibration, check_recipe
from dfq_deploy.disagreements import draw_disagreements
from dfq_deploy.evaluate import Check, evaluate
from dfq_deploy.formats import Job
from dfq_deploy.models import Model
from dfq_deploy.models.loading import model_of
from dfq_deploy.opening import engine_again, images_to_check, images_to_judge_by, load_again, refined_again
from dfq_deploy.planning import plan_of
from dfq_deploy.recipe import CalibrateRecipe, GenerateRecipe, Recipe
from dfq_deploy.reference import Reference
from dfq_deploy.reporting.checked import read_check
from dfq_deploy.sharded import batches_elsewhere, logits_elsewhere
from dfq_deploy.simulation import Simulation, compare, logits_of
from dfq_deploy.stage_costs import Measured, StageCost
from dfq_deploy.synthetic import batches_beside, images_for, write_images
from dfq_deploy.watch import SILENT, Watch, counting
from dfq_deploy.workers import workers_at
from dfq_deploy.workspace import Workspace, held, held_file
from exporters.archive import bundle_folder
from exporters.backends import BuildOptions
from exporters.bundle import Manifest, open_bundle, sign_bundle
from exporters.signing import Signer, signer

__all__ = ["calibrate", "check", "export", "generate", "simulate"]


def export(
    recipe: Recipe,
    out: str | Path,
    *,
    images: str | None = None,
    limit: int | None = None,
    sign: str | Path | None = None,
    others: Path | None = None,
    watch: Watch = SILENT,
) -> Check:
    """Make the bundle that `recipe` describes in the folder `out`, and check its engine.

    Args:
        recipe: The run.
        out: The bundle's folder; finished stages of an earlier run in it are used again.
        images: What to check on (`folder:PATH`, `npz:PATH`, a file); see `check`.
        limit: Check on this many images, evenly spaced.
        sign: PEM file with the private key that signs the manifest.
        others: Folder of other bundles, whose finished stages are used where they are the same.
        watch: Told how it goes.

    Raises:
        DeployError: A stage could not be carried out; what was finished stays.
    """
    out = Path(out)
    signs = None if sign is None else signer(sign)
    check_recipe(recipe, recipe.options)  # told now if it cannot be, not after the images
    with Measured(watch) as measured:
        measured.stage("model", False)
        model = model_of(recipe)
        if images is not None:
            images_to_judge_by(model, images)  # told now if it is wrong, not at the end
        with Workspace(out, measured.stage, others) as work:
            clear_unfinished(out)
            _make(out, recipe, model, work, sign=signs, watch=measured)
            return _check(out, open_bundle(out), model, images=images, limit=limit, watch=measured)


def generate(recipe: GenerateRecipe, out: str | Path, *, ray: str | None = None, watch: Watch = SILENT) -> ImageSet:
    """Make synthetic images and write them to the file `out`.

    Args:
        recipe: The model and the method.
        out: The file; the same bytes with and without a cluster.
        ray: Address of a Ray cluster that makes the batches, HOST:PORT or `auto`. None: they are made here.
        watch: Told how it goes.

    Raises:
        DeployError: The model cannot be loaded, the generator cannot work on it, `out` cannot be written, another run
            is writing it, or there is no such cluster.
    """
    out = writable(Path(out))
    with held_file(out), workers_at(ray) as workers:
        watch.stage("model", False)
        model = model_of(recipe)
        watch.stage("images", False)
        elsewhere = None if ray is None else batches_elsewhere(workers, recipe, model, batches_beside(out))
        write_images(recipe, model, out, watch, elsewhere=elsewhere)
        return ImageSet.load(out)


def calibrate(recipe: CalibrateRecipe, out: str | Path, *, watch: Watch = SILENT) -> QuantPlan:
    """Make a plan and write it to the file `out`; finished stages are kept beside it, in `work/`.

    Raises:
        DeployError: The model or the images cannot be had, their ranges are unusable, or `out` cannot be written.
    """
    out = writable(Path(out))
    check_recipe(recipe, BuildOptions(provider=recipe.provider))
    watch.stage("model", False)
    model = model_of(recipe)
    with Workspace(out.parent, watch.stage) as work:
        calibration = images_for(recipe, model, work, watch)
        plan, _refined, _weights = plan_of(Job(recipe, model, calibration, work, watch))
        plan.save(out)
    return plan


def simulate(
    recipe: CalibrateRecipe,
    out: str | Path,
    *,
    images: str | None = None,
    limit: int | None = None,
    watch: Watch = SILENT,
) -> Simulation:
    """Compute in PyTorch what the model is worth under the plan that `recipe` describes; no engine is made.

    Args:
        recipe: The model, the images and the number formats, those included that no run-time has kernels for.
        out: Folder of `report.json` and `plan.safetensors`; finished stages are kept in its `work/`.
        images: What to compare on (`folder:PATH`, `npz:PATH`, a file). None: the labelled images that the model brings
            along (the demo does), else those that it was calibrated on.
        limit: Use this many of them, evenly spaced.
        watch: Told how it goes.

    Raises:
        DeployError: A stage could not be carried out; what was finished stays.
    """
    out = Path(out)
    check_calibration(recipe)
    watch.stage("model", False)
    model = model_of(recipe)
    picked = images_to_judge_by(model, images)
    with Workspace(out, watch.stage) as work:
        calibration = images_for(recipe, model, work, watch)
        plan, refined, _weights = plan_of(Job(recipe, model, calibration, work, watch))
        (out / "report.json").unlink(missing_ok=True)  # of another plan
        plan.save(out / "plan.safetensors")
        shown = (picked or calibration).spread(limit or len(picked or calibration))
        reference = Reference(refined, plan, model)

        watch.stage("float", False)
        floats = logits_of(reference.float, shown, progress=counting(watch))
        watch.stage("compare", False)
        found = compare(reference, shown, floats, progress=counting(watch))
        found = replace(found, student=calibration.student is not None)
        write_json(out / "report.json", found.report())
    return found


def check(
    folder: str | Path,
    *,
    images: str | None = None,
    limit: int | None = None,
    checkpoint: Path | None = None,
    verify: str | Path | None = None,
    ray: str | None = None,
    watch: Watch = SILENT,
) -> Check:
    """Compare the engine in `folder` with its reference and the float model, and write `folder/report.json`.

    Args:
        folder: A bundle, or a zip archive of one, which stays as it is and gets no report.
        images: `folder:PATH`, `npz:PATH` or an ImageSet file. None: the labelled images that the model brings along
            (the demo does), else the images that the plan was calibrated on.
        limit: Use this many of them, evenly spaced.
        checkpoint: Where the weights lie now, if not where the export found them.
        verify: PEM file with the public key that the bundle must be signed with.
        ray: Address of a Ray cluster that runs engine, reference and float model on shards of the images, HOST:PORT or
            `auto`; all its machines find bundle and images here. None: it is done here. The numbers are the same.
        watch: Told how it goes.

    Raises:
        BundleError: The bundle is incomplete or altered, not signed with that key, or the weights are others than it
            was made from.
        DeployError: The images cannot be had, another run is working in the folder, or there is no such cluster.
    """
    with workers_at(ray) as workers, bundle_folder(Path(folder)) as opened:
        manifest = open_bundle(opened, verify=verify)
        with held(opened), Measured(watch) as measured:
            model = load_again(opened, manifest, checkpoint)
            share = None
            if ray is not None:
                share = partial(logits_elsewhere, workers, Path(folder), manifest, checkpoint=checkpoint)
            return _check(opened, manifest, model, images=images, limit=limit, elsewhere=share, watch=measured)


def _make(out: Path, recipe: Recipe, model: Model, work: Workspace, *, sign: Signer | None, watch: Watch) -> None:
    """Make the bundle in `out`, as far as it is not there yet."""
    calibration = images_for(recipe, model, work, watch)
    plan, refined, weights = plan_of(Job(recipe, model, calibration, work, watch))
    pick("exporters.backends", recipe.backend).check(plan, recipe.options)
    floats = float_stage(refined, work)
    if not is_built(out, recipe, plan):
        watch.stage("engine", False)
        build_bundle(out, recipe, model, refined, weights, plan=plan, images=calibration, floats=floats, sign=sign)
    elif sign is not None:
        sign_bundle(out, sign)


def _check(
    folder: Path,
    manifest: Manifest,
    model: Model,
    *,
    images: str | None,
    limit: int | None,
    elsewhere: Callable[..., Mapping[str, np.ndarray]] | None = None,
    watch: Measured,
) -> Check:
    picked = images_to_check(folder, manifest, model, images)
    picked = picked if limit is None else picked.spread(limit)
    watch.stage("check", False)
    plan = QuantPlan.load(folder / "plan.safetensors")
    engine, quantized, absent = engine_again(folder, manifest)
    with contextlib.closing(engine):
        logits = elsewhere and elsewhere(picked.pixels, absent=absent, progress=counting(watch))
        found = evaluate(
            Reference(refined_again(folder, manifest, model), plan, model),
            engine,
            picked,
            quantized=quantized,
            facts=manifest.engine,
            absent=absent,
            logits=logits,
            progress=counting(watch),
        )
    found = replace(found, student=manifest.model.student, stages={**_stages_before(folder), **watch.costs()})
    sheet = draw_disagreements(found.disagreements, picked, folder)
    of = {"images": picked.fingerprint, "disagreements.png": sheet, **manifest.files}
    write_json(folder / "report.json", {**found.report(), "of": of, "asked": {"images": images, "limit": limit}})
    return found


def _stages_before(folder: Path) -> dict[str, StageCost]:
    """What stages of earlier runs took to make the bundle in `folder`, as far as its report says."""
    try:
        return read_check(folder).stages
    except BundleError:
        return {}
