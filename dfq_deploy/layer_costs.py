"""What quantizing each layer of a finished bundle costs, on its reference: the bundle opened, and `analysis` asked.

Comes after an export, and beside a check: nothing is written, and the engine is not run.
"""

from pathlib import Path

from calibrators.errors import PlanError
from calibrators.plan import QuantPlan
from calibrators.registry import pick
from dfq_deploy.analysis import Sensitivity, analyse
from dfq_deploy.choices import blocks_up_to
from dfq_deploy.formats import formats_for_spared
from dfq_deploy.generation import GenerateOptions
from dfq_deploy.models import Model
from dfq_deploy.opening import calibration_images, folded_again, load_again, open_images, refined_again
from dfq_deploy.watch import SILENT, Watch, counting
from exporters.archive import bundle_folder
from exporters.bundle import Manifest, open_bundle

__all__ = ["sensitivity"]


def sensitivity(
    folder: str | Path,
    *,
    images: str | None = None,
    limit: int = 16,
    checkpoint: Path | None = None,
    verify: str | Path | None = None,
    model: Model | None = None,
    watch: Watch = SILENT,
) -> Sensitivity:
    """Measure what quantizing each layer of the bundle in `folder` costs, on its reference.

    Args:
        folder: A bundle, or a zip archive of one; its engine is not run.
        images: `folder:PATH`, `npz:PATH` or an ImageSet file, labelled or not. None: the images that the plan was
            calibrated on, or noise where those were synthetic and are gone.
        limit: Use this many of them, evenly spaced.
        checkpoint: Where the weights lie now, if not where the export found them.
        verify: PEM file with the public key that the bundle must be signed with.
        model: The model, where the bundle was made of one that came from `wrap`.
        watch: Told how it goes.

    Raises:
        BundleError: The bundle is incomplete or altered, not signed with that key, or the weights are others than it
            was made from.
        PlanError: The plan quantizes nothing.
        DeployError: The images cannot be had.
    """
    with bundle_folder(Path(folder)) as opened:
        manifest = open_bundle(opened, verify=verify)
        watch.stage("model", False)
        model = load_again(opened, manifest, checkpoint, model)
        return _measured(opened, manifest, model, images=images, limit=limit, watch=watch)


def _measured(
    folder: Path, manifest: Manifest, model: Model, *, images: str | None, limit: int, watch: Watch
) -> Sensitivity:
    plan = QuantPlan.load(folder / "plan.safetensors")
    if not plan.sites:
        raise PlanError(
            what=f"there is nothing to measure in `{folder}`.",
            why=f"its scheme, {plan.scheme}, quantizes nothing.",
            fix="export the model with another --scheme.",
        )
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
        spared=formats_for_spared(
            plan, folded, folder / "work", blocks=blocks_up_to(placement, manifest.recipe["block"])
        ),
        refined=refined_again(folder, manifest, model),
        floats=model,
        progress=counting(watch),
    )
