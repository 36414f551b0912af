"""What a bundle must be before any image is looked at: whole, of this model, with its preprocessing and its plan.

Chance has no part in these checks, so they fail at any number of images. Where bundle, weights and plan do not belong
together there is nothing to run.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx_ir as ir

from calibrators.errors import BundleError, DeployError, PlanError
from calibrators.plan import QuantPlan
from dfq_deploy.gating.checks import exact_check
from dfq_deploy.gating.constants import wrong_constants
from dfq_deploy.gating.result import GateCheck
from dfq_deploy.models import Model
from dfq_deploy.opening import load_again, refined_again
from dfq_deploy.reference import Reference
from dfq_deploy.watch import Watch
from exporters.bundle import Manifest, open_bundle

__all__ = ["OpenBundle", "opened"]

_CLASSES = "classes.txt"


@dataclass(frozen=True)
class OpenBundle:
    """A bundle whose files, weights and plan belong together.

    Attributes:
        folder: Where it lies.
        manifest: What it says of itself.
        model: The model as it was loaded.
        reference: The model with the weights that the plan is for, under the plan.
    """

    folder: Path
    manifest: Manifest
    model: Model
    reference: Reference


def opened(
    folder: Path,
    checkpoint: Path | None,
    watch: Watch,
    *,
    model: Model | None = None,
    verify: str | Path | None,
    called: str,
) -> tuple[list[GateCheck], OpenBundle | None]:
    """The checks that need no images, and the bundle; None where one of them leaves nothing to run.

    Args:
        folder: A bundle.
        checkpoint: Where the weights lie now, if not where the export found them.
        watch: Told how it goes.
        model: The model, where it came from `wrap`.
        verify: PEM file with the public key that the bundle must be signed with.
        called: What `folder` is called in reasons.

    Raises:
        BundleError: A file in its `work` folder is gone.
        ModelError: The weights cannot be had.
        RecipeError: `verify` cannot be read as a key.
    """
    checks: list[GateCheck] = []
    name = "bundle"
    try:
        manifest = open_bundle(folder, verify=verify)
        checks.append(exact_check(name, [], f"all {len(manifest.files)} files are as they were sealed"))
        name = "weights"
        watch.stage("model", False)
        model = load_again(folder, manifest, checkpoint, model)
        checks.append(exact_check(name, [], f"they are those that {model.name} was exported with"))
    except BundleError as error:
        wrong = _told(error).replace(str(folder), called)
        return [*checks, exact_check(name, [wrong], "")], None
    checks += _manifest_checks(folder, manifest, model)
    refined = refined_again(folder, manifest, model)
    try:
        reference = Reference(refined, QuantPlan.load(folder / "plan.safetensors"), model)
    except PlanError as error:
        return [*checks, exact_check("plan", [_told(error)], "")], None
    checks += _plan_checks(folder, manifest, reference.plan, refined)
    return checks, OpenBundle(folder, manifest, model, reference)


def _told(error: DeployError) -> str:
    """What is wrong, in a line."""
    return f"{error.what.removesuffix('.')}: {error.why}"


def _manifest_checks(folder: Path, manifest: Manifest, model: Model) -> Iterator[GateCheck]:
    """What the manifest says, held against the model."""
    wanted = asdict(model.preprocess)
    wrong = [
        f"the bundle's {name} is {value}, the model takes {wanted[name]}"
        for name, value in asdict(manifest.preprocess).items()
        if value != wanted[name]
    ]
    yield exact_check("preprocessing", wrong, "the bundle's preprocessing is the model's")
    named = (folder / _CLASSES).read_text(encoding="utf-8").splitlines() if _CLASSES in manifest.files else None
    known = None if model.class_names is None else list(model.class_names)
    wrong = [] if named == known else [f"{_CLASSES} does not name the model's classes in its order"]
    if manifest.model.classes != model.classes:
        wrong.append(f"the manifest says {manifest.model.classes} classes, the model has {model.classes}")
    if (manifest.model.task, manifest.model.outputs) != (model.task, model.outputs):
        wrong.append("the manifest tells of other outputs than the model has")
    yield exact_check("classes", wrong, "the bundle's classes are the model's")


def _plan_checks(folder: Path, manifest: Manifest, plan: QuantPlan, refined: Model) -> Iterator[GateCheck]:
    """The plan is this model's, and model.onnx holds what plan and weights say."""
    wrong = (
        [] if plan.scheme == manifest.scheme else [f"the plan is {plan.scheme}, the manifest says {manifest.scheme}"]
    )
    yield exact_check("plan", wrong, "it was made for these weights")
    weights = {name: values.numpy() for name, values in refined.module.state_dict().items()}
    quantized = ir.load(folder / "model.onnx")
    wrong, count = wrong_constants(quantized, plan, weights, body=manifest.engine.options.body)
    yield exact_check("constants", wrong, f"{count} constants of model.onnx are those of plan and weights")
