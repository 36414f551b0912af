"""From a plan to a bundle: float ONNX, Q/DQ, engine, census, and the manifest that seals them.

Comes after calibration and before the check. It decides what lies in a bundle; `exporters.bundle` says how that is
written and verified.
"""

import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from calibrators.errors import DeployError, ExportError
from calibrators.files import write_text
from calibrators.images import ImageSet
from calibrators.plan import QuantPlan
from calibrators.registry import pick
from dfq_deploy.machine import versions_of
from dfq_deploy.models import Model
from dfq_deploy.recipe import Recipe
from dfq_deploy.recipe_file import save_recipe
from dfq_deploy.workspace import Workspace
from exporters.backends import BuildOptions, Built
from exporters.bundle import EngineFacts, Manifest, ModelFacts, open_bundle, seal_bundle, unseal_bundle
from exporters.cast import CastBody
from exporters.qdq import InsertQDQ
from exporters.signing import Signer
from exporters.to_onnx import export_float, save_model, torch_parity

__all__ = ["build_bundle", "built_with", "float_onnx", "float_stage", "is_built", "layer_times", "made_with"]

_MADE_WITH = ("dfq-deploy", "torch", "timm", "onnx", "onnx-ir", "onnxscript", "onnxsim", "onnxruntime", "numpy")
_BUILDERS = ("tensorrt", "tensorrt-rtx-cu13")
_PARITY_LIMIT = 1e-3  # of an output's largest value; a faithful float export is at 1e-5 or better


def made_with() -> dict[str, str]:
    """Versions of everything that images, plans and float models depend on."""
    return {name: version(name) for name in _MADE_WITH}


def built_with() -> dict[str, str]:
    """Versions of everything that an engine depends on."""
    return made_with() | versions_of(_BUILDERS)


def float_onnx(model: Model, path: Path) -> None:
    """Write the float ONNX model, its tensors named by site.

    Raises:
        ExportError: The model cannot be exported.
    """
    named = [output.name for output in model.outputs]
    export_float(model.module, torch.zeros(2, *model.preprocess.shape), path, outputs=named)


def float_stage(model: Model, work: Workspace) -> Path:
    """The float ONNX model, made once."""
    facts = [model.fingerprint, made_with()]
    return work.stage("float", ".onnx", facts, lambda path: float_onnx(model, path))


def is_built(out: Path, recipe: Recipe, plan: QuantPlan) -> bool:
    """Whether `out` holds the whole bundle of this recipe and this plan already, engine and all, of these versions."""
    try:
        manifest = open_bundle(out)
        same_plan = QuantPlan.load(out / "plan.safetensors").fingerprint == plan.fingerprint
    except DeployError:
        return False
    whole = manifest.engine.state == "built" and manifest.backend == recipe.backend
    return same_plan and whole and manifest.recipe == recipe.facts() and manifest.versions == built_with()


def build_bundle(
    out: Path,
    recipe: Recipe,
    model: Model,
    refined: Model,
    weights: tuple[Path, ...],
    *,
    plan: QuantPlan,
    images: ImageSet,
    floats: Path,
    sign: Signer | None = None,
) -> None:
    """Make the bundle in `out` from the float ONNX model `floats`.

    Args:
        out: The bundle's folder.
        recipe: The run.
        model: The model as it was loaded.
        refined: The model with the weights that the plan is for.
        weights: The files in the run folder with what refine passes changed.
        plan: The plan.
        images: The calibration images.
        floats: The float ONNX form of `refined`.
        sign: Signs the manifest.

    Raises:
        ExportError: The float model differs from torch, the plan does not fit it, or the engine computes a planned
            layer in float.
        BackendError: The run-time cannot load the model.
    """
    before = unseal_bundle(out)  # from here until the manifest is written, this is no bundle
    for weights_beside in out.glob("*.onnx.data"):  # or those of an earlier, larger model would count as this one's
        weights_beside.unlink()
    plan.save(out / "plan.safetensors")
    save_recipe(recipe, out / "recipe.toml")
    parity = _parity(refined, floats)
    backend = pick("exporters.backends", recipe.backend)
    options = recipe.options
    _quantize(floats, plan, recipe.backend, options, out / "model.onnx")
    built: Built = backend.build(out / "model.onnx", plan, options)
    files = ["plan.safetensors", "model.onnx", *built.files]
    if recipe.keep_float:
        save_model(ir.load(floats), out / "float.onnx")
        files.append("float.onnx")
    if model.class_names is not None:
        write_text(out / "classes.txt", "\n".join(model.class_names) + "\n")
        files.append("classes.txt")
    files += [f"{name}.data" for name in files if (out / f"{name}.data").exists()]
    # Of another backend or option, or left by an export that failed, whose files no manifest names.
    for stale in {*before, "float.onnx", "classes.txt"} - set(files):
        (out / stale).unlink(missing_ok=True)
    seal_bundle(out, _manifest(recipe, model, weights, images, built, parity), files, sign=sign)


def layer_times(
    plans: Mapping[str, QuantPlan], floats: Path, backend: str, options: BuildOptions
) -> dict[str, dict[str, float]]:
    """Milliseconds per layer in a call with one image, "" for all else: under each plan, and of `float`.

    Raises:
        BackendError: The backend cannot say.
    """
    layers = dict.fromkeys(layer for plan in plans.values() for layer in plan.layers)
    with tempfile.TemporaryDirectory() as folder:
        models = {name: Path(folder) / f"{name}.onnx" for name in plans}
        for name, plan in plans.items():
            _quantize(floats, plan, backend, options, models[name])
        paths = [floats, *models.values()]
        times = pick("exporters.backends", backend).time_layers(paths, layers, options)
    return dict(zip(["float", *models], times, strict=True))


def _quantize(floats: Path, plan: QuantPlan, backend: str, options: BuildOptions, path: Path) -> None:
    """Write to `path` what `backend` gets to build: the float ONNX model with the plan in it."""
    quantized = InsertQDQ(plan)(ir.load(floats)).model
    if options.body != "fp32":
        quantized = CastBody(options.body)(quantized).model
    pick("exporters.backends", backend).prepare(quantized, plan, options)
    save_model(quantized, path)


def _parity(model: Model, floats: Path) -> float:
    images = np.random.default_rng(0).normal(size=(3, *model.preprocess.shape)).astype(np.float32)
    parity = torch_parity(model.module, floats, images)
    if not parity <= _PARITY_LIMIT:
        raise ExportError(
            what=f"the float ONNX model differs from torch by {parity:.1e} of its largest output.",
            why="the exporter translated an operator wrongly, or the model is not deterministic.",
            fix="report this model; its quantized engine would be wrong as well.",
        )
    return parity


def _manifest(
    recipe: Recipe, model: Model, weights: tuple[Path, ...], images: ImageSet, built: Built, parity: float
) -> Manifest:
    facts = recipe.facts()
    return Manifest(
        model=ModelFacts(
            name=model.name,
            checkpoint=facts.get("checkpoint"),
            random_weights=recipe.random_weights,
            seed=recipe.seed,
            fingerprint=model.fingerprint,
            classes=model.classes,
            task=model.task,
            outputs=model.outputs,
            wrapped=model.wrapped,
            refined=tuple(path.name for path in weights),
        ),
        preprocess=model.preprocess,
        backend=recipe.backend,
        scheme=recipe.scheme,
        recipe=facts,
        images={"source": images.source, "fingerprint": images.fingerprint},
        float_parity=parity,
        engine=EngineFacts.of(built, recipe.options),
        versions=built_with(),
        files={},
    )
