"""The stages, read top to bottom: model, images, ranges, plan, float ONNX, quantized ONNX, engine, check.

Each stage takes artefacts and gives an artefact. What is already done is the workspace's business, what is printed the
command line's. `export` runs them all; `generate`, `calibrate` and `check` are parts of it. From Python, a model that
`wrap` made stands in for the recipe that names one, with the recipe's other fields beside it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields as fields_of
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from calibrators.errors import BundleError, RecipeError
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
from dfq_deploy.recipe import CalibrateRecipe, GenerateRecipe, ModelRecipe, Recipe, SimulateRecipe
from dfq_deploy.reference import Reference
from dfq_deploy.reporting.checked import read_check
from dfq_deploy.sharded import batches_elsewhere, logits_elsewhere
from dfq_deploy.simulation import Simulation, compare, rows_for
from dfq_deploy.stage_costs import Measured, StageCost
from dfq_deploy.synthetic import batches_beside, images_for, write_images
from dfq_deploy.watch import SILENT, Watch, counting
from dfq_deploy.workers import workers_at
from dfq_deploy.workspace import Workspace, held, held_file, refuse_bundle
from exporters.archive import bundle_folder
from exporters.backends import BuildOptions
from exporters.bundle import Manifest, open_bundle, sign_bundle
from exporters.signing import Signer, signer

__all__ = ["calibrate", "check", "export", "generate", "simulate"]

_Asked = TypeVar("_Asked", bound=ModelRecipe)


def export(
    recipe: Recipe | Model,
    out: str | Path,
    *,
    images: str | None = None,
    limit: int | None = None,
    sign: str | Path | None = None,
    others: Path | None = None,
    watch: Watch = SILENT,
    **fields: Any,
) -> Check:
    """Make the bundle that `recipe` describes in the folder `out`, and check its engine.

    Args:
        recipe: The run; or a model from `wrap`.
        out: The bundle's folder; finished stages of an earlier run in it are used again.
        images: What to check on (`folder:PATH`, `npz:PATH`, a file); see `check`.
        limit: Check on this many images, evenly spaced.
        sign: PEM file with the private key that signs the manifest.
        others: Folder of other bundles, whose finished stages are used where they are the same.
        watch: Told how it goes.
        **fields: With a model from `wrap`, the fields of `Recipe` that are not its defaults.

    Raises:
        DeployError: A stage could not be carried out; what was finished stays.
    """
    recipe, given = _asked(recipe, Recipe, fields)
    out = Path(out)
    signs = None if sign is None else signer(sign)
    check_recipe(recipe, recipe.options)  # told now if it cannot be, not after the images
    with Measured(watch) as measured:
        measured.stage("model", False)
        model = given or model_of(recipe)
        if recipe.backend != "ort" and len(model.outputs) > 1:
            raise RecipeError(
                what=f"backend `{recipe.backend}` cannot run `{model.name}`: it has {len(model.outputs)} outputs.",
                why="what loads TensorRT's engines here reads one.",
                fix="use --backend ort, or wrap a module with one output.",
            )
        if images is not None:
            images_to_judge_by(model, images)  # told now if it is wrong, not at the end
        with Workspace(out, measured.stage, others) as work:
            clear_unfinished(out)
            _make(out, recipe, model, work, sign=signs, watch=measured)
            return _check(out, open_bundle(out), model, images=images, limit=limit, watch=measured)


def generate(
    recipe: GenerateRecipe | Model,
    out: str | Path,
    *,
    ray: str | None = None,
    watch: Watch = SILENT,
    **fields: Any,
) -> ImageSet:
    """Make synthetic images and write them to the file `out`.

    Args:
        recipe: The model and the method; or a model from `wrap`.
        out: The file; the same bytes with and without a cluster.
        ray: Address of a Ray cluster that makes the batches, HOST:PORT or `auto`. None: they are made here.
        watch: Told how it goes.
        **fields: With a model from `wrap`, the fields of `GenerateRecipe` that are not its defaults.

    Raises:
        DeployError: The model cannot be loaded, the generator cannot work on it, `out` cannot be written, another run
            is writing it, or there is no such cluster.
    """
    recipe, given = _asked(recipe, GenerateRecipe, fields)
    _refuse_elsewhere(given, ray)
    out = writable(Path(out))
    with held_file(out), workers_at(ray) as workers:
        watch.stage("model", False)
        model = given or model_of(recipe)
        watch.stage("images", False)
        elsewhere = None if ray is None else batches_elsewhere(workers, recipe, model, batches_beside(out))
        write_images(recipe, model, out, watch, elsewhere=elsewhere)
        return ImageSet.load(out)


def calibrate(recipe: CalibrateRecipe | Model, out: str | Path, *, watch: Watch = SILENT, **fields: Any) -> QuantPlan:
    """Make a plan and write it to the file `out`; finished stages are kept beside it, in `work/`.

    `recipe` and `fields` are as of `export`.

    Raises:
        DeployError: The model or the images cannot be had, their ranges are unusable, or `out` cannot be written.
    """
    recipe, given = _asked(recipe, CalibrateRecipe, fields)
    out = writable(Path(out))
    check_recipe(recipe, BuildOptions(provider=recipe.provider))
    watch.stage("model", False)
    model = given or model_of(recipe)
    with Workspace(out.parent, watch.stage) as work:
        refuse_bundle(out.parent)
        calibration = images_for(recipe, model, work, watch)
        plan, _refined, _weights = plan_of(Job(recipe, model, calibration, work, watch))
        plan.save(out)
    return plan


def simulate(
    recipe: CalibrateRecipe | Model,
    out: str | Path,
    *,
    images: str | None = None,
    limit: int | None = None,
    watch: Watch = SILENT,
    **fields: Any,
) -> Simulation:
    """Compute in PyTorch what the model is worth under the plan that `recipe` describes; no engine is made.

    Args:
        recipe: The model, the images and the number formats, those included that no run-time has kernels for; or a
            model from `wrap`.
        out: Folder of `report.json` and `plan.safetensors`; finished stages are kept in its `work/`.
        images: What to compare on (`folder:PATH`, `npz:PATH`, a file). None: the labelled images that the model brings
            along (the demo does), else those that it was calibrated on.
        limit: Use this many of them, evenly spaced.
        watch: Told how it goes.
        **fields: With a model from `wrap`, the fields of `SimulateRecipe` that are not its defaults.

    Raises:
        DeployError: A stage could not be carried out; what was finished stays.
    """
    recipe, given = _asked(recipe, SimulateRecipe, fields)
    out = Path(out)
    check_calibration(recipe)
    watch.stage("model", False)
    model = given or model_of(recipe)
    picked = images_to_judge_by(model, images)
    with Workspace(out, watch.stage) as work:
        refuse_bundle(out)
        calibration = images_for(recipe, model, work, watch)
        plan, refined, _weights = plan_of(Job(recipe, model, calibration, work, watch))
        (out / "report.json").unlink(missing_ok=True)  # of another plan
        plan.save(out / "plan.safetensors")
        shown = (picked or calibration).spread(len(picked or calibration) if limit is None else limit)
        reference = Reference(refined, plan, model)

        watch.stage("float", False)
        floats = rows_for(reference.float, shown, progress=counting(watch))
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
    model: Model | None = None,
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
        model: The model, where the bundle was made of one that came from `wrap`.
        verify: PEM file with the public key that the bundle must be signed with.
        ray: Address of a Ray cluster that runs engine, reference and float model on shards of the images, HOST:PORT or
            `auto`; all its machines find bundle and images here. None: it is done here. The numbers are the same.
        watch: Told how it goes.

    Raises:
        BundleError: The bundle is incomplete or altered, not signed with that key, or the weights are others than it
            was made from.
        DeployError: The images cannot be had, another run is working in the folder, or there is no such cluster.
    """
    _refuse_elsewhere(model, ray)
    with workers_at(ray) as workers, bundle_folder(Path(folder)) as opened:
        open_bundle(opened, verify=verify)  # before anything is written there
        with held(opened), Measured(watch) as measured:
            manifest = open_bundle(opened, verify=verify)  # as it is now: an export may just have ended
            model = load_again(opened, manifest, checkpoint, model)
            share = None
            if ray is not None:
                share = partial(
                    logits_elsewhere, workers, Path(folder), manifest, numbers=model.numbers, checkpoint=checkpoint
                )
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
    elsewhere: Callable[..., Iterator[Mapping[str, np.ndarray]]] | None = None,
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


def _asked(recipe: _Asked | Model, kind: type[_Asked], fields: Mapping[str, Any]) -> tuple[_Asked, Model | None]:
    """The recipe, and the model where that came from `wrap`, so that `fields` are the rest of the recipe.

    Raises:
        RecipeError: A field does not exist, or there is a recipe that would hold it.
    """
    known = {field.name for field in fields_of(kind)} - {field.name for field in fields_of(ModelRecipe)} | {"seed"}
    unknown = sorted(fields.keys() - (known if isinstance(recipe, Model) else set()))
    if unknown:
        raise RecipeError(
            what=f"there is no argument named `{unknown[0]}`.",
            why=f"beside a model from `wrap` there are {', '.join(sorted(known))}."
            if isinstance(recipe, Model)
            else "what describes a run is in its recipe.",
            fix="pass one of those." if isinstance(recipe, Model) else f"make it a field of {kind.__name__}.",
        )
    return (kind(model=recipe.name, **fields), recipe) if isinstance(recipe, Model) else (recipe, None)


def _refuse_elsewhere(model: Model | None, ray: str | None) -> None:
    """Return if the machines of a cluster, should there be one, can load the model.

    Raises:
        RecipeError: It came from `wrap`.
    """
    if model is not None and ray is not None:
        raise RecipeError(
            what=f"other machines cannot load `{model.name}`.",
            why="it came from Python and not by a name.",
            fix="leave ray out.",
        )
