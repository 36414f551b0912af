"""From a model and its calibration images to a plan: refined weights, ranges, number formats, and what stays float.

Comes after the images and before ONNX. What is refused by the recipe alone is refused first, since making images takes
minutes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from calibrators.affine import CODES, choose_qparams
from calibrators.collectors import Collector, Subject, described
from calibrators.errors import PlanError
from calibrators.files import written_whole
from calibrators.folds import layers_of
from calibrators.images import ImageSet
from calibrators.plan import QParams, QuantPlan, Ranges, SiteRange, layer_of, make_plan
from calibrators.refining import correct, is_transform, transform
from calibrators.registry import pick
from calibrators.scheme import QuantScheme, scheme_named
from calibrators.sites import block_ranges
from dfq_deploy.analysis import noisy_layers
from dfq_deploy.building import float_onnx, made_with
from dfq_deploy.models import Model
from dfq_deploy.recipe import CalibrateRecipe
from dfq_deploy.refined import copy_of, load_refined, load_scales, save_refined
from dfq_deploy.sparing import layers_to_spare
from dfq_deploy.workspace import Workspace
from exporters.backends import BuildOptions, Placement

__all__ = ["blocks_of", "check_recipe", "float_stage", "formats_for_spared", "plan_of"]

_WORDS = {"auto", "massive"}  # of --spare, beside names
_WANTED_DB = 24.0  # of the logits' SQNR on the calibration images; on real ones it is 1 to 3 dB less
_WANTED_WEIGHTS_DB = 16.5  # of that of weights alone in blocks
_BYTES_MORE = 0.5  # that INT8 takes per weight
_BUDGET = 4 * 2**20  # bytes that a file may grow by for it: little, and all that a small model needs


def check_recipe(recipe: CalibrateRecipe, options: BuildOptions) -> None:
    """Return if the collector can begin and the backend takes what the recipe asks for, whatever the model.

    Raises:
        RecipeError: The collector has no such observer, or none for the scheme's activations.
        BackendError: A run-time is missing, or takes no such plan.
    """
    _collector(recipe).check(_observer(recipe), scheme_named(recipe.scheme).activation)
    pick("exporters.backends", recipe.backend).check(_one_layer_plan(recipe), options)


def float_stage(model: Model, work: Workspace) -> Path:
    """The float ONNX model."""
    facts = [model.fingerprint, made_with()]
    return work.stage("float", ".onnx", facts, lambda path: float_onnx(model, path))


def plan_of(
    recipe: CalibrateRecipe,
    model: Model,
    images: ImageSet,
    work: Workspace,
    progress: Callable[[int, int, Mapping[str, float]], object],
) -> tuple[QuantPlan, Model, tuple[Path, ...]]:
    """The plan that the recipe asks for, the model with the weights that it is for, and the files that hold those.

    Where no pass is asked for the model is `model`, and there are no files.

    Raises:
        PlanError: A range is unusable, nothing is left to quantize, or a layer to spare does not exist.
    """
    scheme = _scheme(recipe)
    passes = _passes(recipe)
    transforms = [name for name in passes if is_transform(name)]
    corrections = [name for name in passes if name not in transforms]
    blocks = _blocks(recipe)
    facts = [images.fingerprint, recipe.scheme, scheme.weight and scheme.weight.name, blocks, made_with()]
    refined, weights = model, []

    def fold(path: Path) -> None:
        folded = copy_of(model)
        transform(folded.module, images, transforms, scheme, blocks)
        save_refined(path, model, folded)

    if transforms:
        path = work.stage("folded", ".safetensors", [model.fingerprint, transforms, *facts], fold)
        weights.append(path)
        refined = load_refined(model, path)
    plan = _spared(recipe, refined, images, work, _plan(recipe, refined, images, work, progress), progress)

    def correct_layers(path: Path) -> None:
        corrected = copy_of(refined)
        sites = correct(corrected.module, plan.sites, images, corrections)
        save_refined(path, model, corrected, sites)

    if corrections:
        key = [refined.fingerprint, plan.fingerprint, corrections, *facts]
        path = work.stage("refined", ".safetensors", key, correct_layers)
        weights.append(path)
        refined = load_refined(model, path)
        plan = replace(plan, sites=load_scales(path, plan.sites), model=refined.fingerprint)
    return plan, refined, tuple(weights)


def _passes(recipe: CalibrateRecipe) -> tuple[str, ...]:
    if recipe.refine == "none":
        return ()
    if recipe.refine != "default":
        return tuple(recipe.refine.split(","))
    own_ranges = recipe.observer != "auto" or recipe.collector != "pytorch"  # asked for: `reach` would replace them
    return tuple(name for name in _scheme(recipe).refine if not (own_ranges and name == "reach"))


def _spared(
    recipe: CalibrateRecipe,
    model: Model,
    images: ImageSet,
    work: Workspace,
    plan: QuantPlan,
    progress: Callable[[int, int, Mapping[str, float]], object],
) -> QuantPlan:
    """The plan without the layers that make most of the noise, if `--spare auto` is asked for.

    Where activations are quantized these layers stay float, and the time that takes decides between them. Where weights
    alone are, in blocks, these layers get INT8 weights with a scale per channel, and bytes decide.
    """
    scheme = _scheme(recipe)
    integers = scheme.activation is not None and scheme.activation.mantissa is None
    if not (integers or scheme.blocked) or _placement(recipe).noisy_layers or "auto" not in recipe.spare.split(","):
        return plan
    instead = _int8_weights(model, plan) if scheme.blocked else {}
    limits: dict[str, Any] = {"wanted_db": _WANTED_DB}
    if scheme.blocked:
        more = {layer_of(site): _BYTES_MORE * float(q.scale.size * (q.block or 1)) for site, q in plan.sites.items()}
        limits = {"wanted_db": _WANTED_WEIGHTS_DB, "costs": more, "budget": _BUDGET}

    def measure(path: Path) -> None:
        noisy = noisy_layers(model, plan, images, **limits, progress=lambda done, total: progress(done, total, {}))
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(noisy), encoding="utf-8")

    facts = [plan.fingerprint, images.fingerprint, limits, made_with()]
    noisy = json.loads(work.stage("noise", ".json", facts, measure).read_text(encoding="utf-8"))
    why = {site: noisy[layer_of(site)] for site in plan.sites if layer_of(site) in noisy}
    if instead:
        why = {site: f"{reason}: its weights have 8 bits" for site, reason in why.items()}
    sites = {site: instead.get(site, q) if site in why else q for site, q in plan.sites.items()}
    sites = {site: q for site, q in sites.items() if site in instead or site not in why}
    return replace(plan, sites=sites, spared={**plan.spared, **why})


def _int8_weights(model: Model, plan: QuantPlan) -> dict[str, QParams]:
    """What the weights of `plan` are in INT8, with a scale per channel."""
    layers, codes = layers_of(model.module), CODES["int8"]
    weights = {site: layers[layer_of(site)].weight.numpy(force=True) for site in plan.sites}
    return {site: QParams(*choose_qparams(w.min(1), w.max(1), codes), codes, 0) for site, w in weights.items()}


def _scheme(recipe: CalibrateRecipe) -> QuantScheme:
    """The recipe's scheme, with the weights' zero-points that its run-time takes."""
    scheme = scheme_named(recipe.scheme)
    asymmetric = scheme.blocked and _placement(recipe).zero_points
    return replace(scheme, weight=CODES["uint4"]) if asymmetric else scheme


def _placement(recipe: CalibrateRecipe) -> Placement:
    found: Placement = pick("exporters.backends", recipe.backend).placement(BuildOptions(provider=recipe.provider))
    return found


def _plan(
    recipe: CalibrateRecipe,
    model: Model,
    images: ImageSet,
    work: Workspace,
    progress: Callable[[int, int, Mapping[str, float]], object],
) -> QuantPlan:
    ranges = _ranges(recipe, model, images, work, progress)
    scheme = _scheme(recipe)
    placement = _placement(recipe)
    ranges = replace(ranges, sites={**ranges.sites, **block_ranges(model.module, _blocks(recipe))})
    asked = [] if recipe.spare == "none" else recipe.spare.split(",")
    spare = _asked_for([name for name in asked if name not in _WORDS], model, ranges)
    if _WORDS & set(asked):
        spare |= layers_to_spare(model, scheme, first_layer=placement.first_layer)
    plan = make_plan(ranges, scheme, attention=recipe.attention, outputs=placement.convolution_outputs, spare=spare)
    unfit = f"input channels are not two or more blocks of {recipe.block}: it has blocks of"
    smaller = {
        site: f"its {q.scale.shape[1] * q.block} {unfit} {q.block}"
        for site, q in plan.sites.items()
        if q.block not in (None, recipe.block)
    }
    return replace(plan, spared={**plan.spared, **smaller})


def _blocks(recipe: CalibrateRecipe) -> tuple[int, ...]:
    """Sizes that the blocks of weights may have, if there are any."""
    return blocks_of(_placement(recipe), recipe.block) if _scheme(recipe).blocked else ()


def blocks_of(placement: Placement, block: int) -> tuple[int, ...]:
    """Sizes that blocks may have: the one asked for and, where that does not fit a layer, smaller ones."""
    return tuple(size for size in placement.blocks if size <= block)


def formats_for_spared(plan: QuantPlan, model: Model, work: Path, *, blocks: Sequence[int]) -> dict[str, QParams]:
    """What sites that `plan` spares would be rounded to, where `work` holds the ranges that it was made from.

    Args:
        plan: A plan.
        model: The model whose ranges those are: before any layer was corrected.
        work: A run's `work/`; it may be gone.
        blocks: Sizes that blocks may have, where the plan's scheme has any.
    """
    scheme = scheme_named(plan.scheme)
    kept = (Ranges.load(path) for path in sorted(work.glob("ranges-*.safetensors")))
    ranges = next((r for r in kept if (r.model, r.images) == (model.fingerprint, plan.images)), None)
    if ranges is None:
        return {}
    if scheme.blocked:
        ranges = replace(ranges, sites={**ranges.sites, **block_ranges(model.module, blocks)})
    in_blocks = (q.codes for q in plan.sites.values() if q.block)
    full = make_plan(ranges, replace(scheme, weight=next(in_blocks, scheme.weight)), attention=True)
    return {site: full.sites[site] for site in plan.spared if site in full.sites}


def _asked_for(names: list[str], model: Model, ranges: Ranges) -> dict[str, str]:
    layers = list(dict.fromkeys(map(layer_of, ranges.sites)))
    spare = dict.fromkeys(names, "asked for with --spare")
    unknown = sorted(spare.keys() - set(layers))
    if unknown:
        raise PlanError(
            what=f"--spare names `{unknown[0]}`, which is no layer of `{model.name}`.",
            why=f"its layers are called like {', '.join(layers[:4])}.",
            fix="pass none, or such names and auto or massive with commas between them.",
        )
    return spare


def _ranges(
    recipe: CalibrateRecipe,
    model: Model,
    images: ImageSet,
    work: Workspace,
    progress: Callable[[int, int, Mapping[str, float]], object],
) -> Ranges:
    collector, observer, codes = _collector(recipe), _observer(recipe), _scheme(recipe).activation
    subject = Subject(model.module, model.fingerprint, float_stage(model, work) if collector.NEEDS_ONNX else None)

    def make(path: Path) -> None:
        collector.collect_ranges(
            subject,
            images,
            observer=observer,
            percentile=recipe.percentile,
            codes=codes,
            progress=lambda done, total: progress(done, total, {}),
        ).save(path)

    used = described(observer, recipe.percentile, codes)
    facts = [model.fingerprint, images.fingerprint, recipe.collector, used, made_with()]
    return Ranges.load(work.stage("ranges", ".safetensors", facts, make))


def _collector(recipe: CalibrateRecipe) -> Collector:
    plugin: Any = pick("calibrators.collectors", recipe.collector)
    collector: Collector = plugin
    return collector


def _observer(recipe: CalibrateRecipe) -> str:
    """The recipe's observer; `auto` is what suits the scheme, where the collector has it."""
    if recipe.observer != "auto":
        return recipe.observer
    suited, offered = _scheme(recipe).observer, _collector(recipe).OBSERVERS
    return suited if suited in offered else offered[0]


def _one_layer_plan(recipe: CalibrateRecipe) -> QuantPlan:
    """What the recipe asks for, of a model with one layer."""
    scheme = _scheme(recipe)
    width, low, high = 2 * recipe.block, np.full((2, 2), -1.0), np.full((2, 2), 2.0)
    weight = SiteRange(low[0], high[0], "weight", 0, (2, width))
    if scheme.blocked:
        weight = SiteRange(low, high, "weight", 0, (2, width), recipe.block)
    sites = {"layer.input": SiteRange(low[0, 0], high[0, 0], "input", None, (width,)), "layer.weight": weight}
    return make_plan(Ranges(sites, "", "", ""), scheme)
