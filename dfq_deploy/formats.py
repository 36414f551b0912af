"""Which number format each site gets: ranges in, a plan out, with the layers spared that quantization serves badly.

Ranges give the plan that the scheme asks for. Which layers leave it, for float or a finer format, is asked for by name,
found with no data (`dfq_deploy.sparing`), measured by their noise, or chosen under a budget (`dfq_deploy.assignment`).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calibrators.affine import CODES, choose_qparams
from calibrators.collectors import Subject, described
from calibrators.collectors.pytorch import collect_ranges
from calibrators.errors import PlanError
from calibrators.files import write_json
from calibrators.folds import layers_of
from calibrators.images import ImageSet
from calibrators.plan import QParams, QuantPlan, layer_of, make_plan
from calibrators.ranges import Ranges
from calibrators.scheme import SCHEMES, scheme_named
from calibrators.sites import block_ranges
from dfq_deploy.assignment import Assignment, Budget, apply, assign, noisy_layers, sizes
from dfq_deploy.building import built_with, float_stage, layer_times, made_with
from dfq_deploy.choices import blocks_of, blocks_up_to, collector_of, observer_of, placement_of, scheme_of
from dfq_deploy.models import Model
from dfq_deploy.readers import read_by_several
from dfq_deploy.recipe import CalibrateRecipe, note_unused
from dfq_deploy.sparing import layers_to_spare
from dfq_deploy.watch import Watch, counting
from dfq_deploy.workspace import Workspace
from exporters.backends import BuildOptions

__all__ = ["FormatsOf", "Job", "formats_for_spared", "formats_from", "formats_of"]

_FIELDS = ("scheme", "backend", "provider", "block", "observer", "percentile", "attention", "spare", "auto")
_WORDS = {"auto", "massive"}  # of --spare, beside names
_WANTED_DB = 29.0  # of the logits' SQNR on the calibration images; on real ones ViT-T and DeiT-T had 29.0 to 31.6
_WANTED_WEIGHTS_DB = 22.0  # of that of weights alone in blocks
_BYTES_MORE = 0.5  # that INT8 takes per weight
_BUDGET = 4 * 2**20  # bytes that a file may grow by for it: little, and all that a small model needs


@dataclass(frozen=True)
class Job:
    """A recipe with what it works on.

    Attributes:
        recipe: What is asked for.
        model: The model.
        images: The calibration images.
        work: Where finished stages are kept.
        watch: Told how it goes.
    """

    recipe: CalibrateRecipe
    model: Model
    images: ImageSet
    work: Workspace
    watch: Watch

    def json(self, stage: str, facts: list[Any], make: Callable[[], Any]) -> Any:
        """What `make` gives, kept as the JSON file of a stage."""

        def write(path: Path) -> None:
            write_json(path, make())

        return json.loads(self.work.stage(stage, ".json", [*facts, made_with()], write).read_text(encoding="utf-8"))


def formats_of(job: Job) -> QuantPlan:
    """The plan for `job.model` as it is, before any layer is corrected.

    Raises:
        PlanError: A range is unusable, nothing is left to quantize, or a layer to spare does not exist.
    """
    if not job.recipe.auto:
        note_unused(job.recipe, ("least", "max_drop", "min_agreement"), "without --auto")
    plan = formats_from(job.recipe, job.model, _ranges(job))
    return _assigned(job, plan) if job.recipe.auto else _without_noisy_layers(job, plan)


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
        scheme = replace(scheme, weight=next(in_blocks, scheme.weight))
    full = make_plan(ranges, scheme, attention=True)
    return {site: full.sites[site] for site in plan.spared if site in full.sites}


@dataclass(frozen=True)
class FormatsOf:
    """The formats of a recipe, for what a student is to be rounded to; see `dfq_deploy.generation.Formats`."""

    recipe: CalibrateRecipe

    @property
    def facts(self) -> list[object]:
        """The fields that are looked at, and what a softmax gets."""
        softmax = scheme_of(self.recipe).softmax
        return [*(getattr(self.recipe, name) for name in _FIELDS), softmax and softmax.name]

    def __call__(self, model: Model, images: ImageSet) -> QuantPlan:
        """The plan for `model` as it is, with ranges from PyTorch and no layer spared for the noise that it makes."""
        recipe = self.recipe
        codes, observer = scheme_named(recipe.scheme).activation, observer_of(recipe)
        subject = Subject(model.module, model.fingerprint)
        ranges = collect_ranges(subject, images, observer=observer, percentile=recipe.percentile, codes=codes)
        return formats_from(recipe, model, ranges)


def formats_from(recipe: CalibrateRecipe, model: Model, ranges: Ranges) -> QuantPlan:
    """The plan for `model` as it is from its `ranges`, with no layer spared for the noise that it makes.

    The scheme's formats everywhere but where the recipe, or what noise shows, says otherwise.

    Raises:
        PlanError: A range is unusable, nothing is left to quantize, or a layer to spare does not exist.
    """
    scheme, placement = scheme_of(recipe), placement_of(recipe)
    ends = {model.first, *model.classifiers} if scheme.simulated else ()
    ranges = replace(ranges, sites={**ranges.sites, **block_ranges(model.module, blocks_of(recipe))})
    asked = [] if recipe.spare == "none" else recipe.spare.split(",")
    spare = _asked_for([name for name in asked if name not in _WORDS], model, ranges)
    outputs = placement.convolution_outputs and not scheme.simulated
    if _WORDS & set(asked):
        spare |= layers_to_spare(model, scheme, first_layer=placement.first_layer, measured=recipe.auto)
        if outputs and scheme.activation is not None and not scheme.dynamic:
            spare |= read_by_several(model)
    plan = make_plan(
        ranges,
        scheme,
        attention=recipe.attention or scheme.simulated,
        outputs=outputs,
        spare=spare,
        ends=ends,
    )
    unfit = f"input channels are not two or more blocks of {recipe.block}: it has blocks of"
    smaller = {
        site: f"its {q.scale.shape[1] * q.block} {unfit} {q.block}"
        for site, q in plan.sites.items()
        if q.block not in (None, recipe.block)
    }
    return replace(plan, spared={**plan.spared, **smaller})


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


def _ranges(job: Job) -> Ranges:
    recipe, model, images = job.recipe, job.model, job.images
    collector, observer, codes = collector_of(recipe), observer_of(recipe), scheme_named(recipe.scheme).activation

    def make(path: Path) -> None:
        floats = float_stage(model, job.work) if collector.NEEDS_ONNX else None
        job.watch.stage("ranges", False)  # again: the float model has a stage of its own
        collector.collect_ranges(
            Subject(model.module, model.fingerprint, floats),
            images,
            observer=observer,
            percentile=recipe.percentile,
            codes=codes,
            progress=counting(job.watch),
        ).save(path)

    used = described(observer, recipe.percentile, codes)
    facts = [model.fingerprint, images.fingerprint, recipe.collector, used, built_with()]
    return Ranges.load(job.work.stage("ranges", ".safetensors", facts, make))


def _without_noisy_layers(job: Job, plan: QuantPlan) -> QuantPlan:
    """The plan without the layers that make most of the noise, if `--spare auto` is asked for.

    Where activations are quantized these layers stay float, and the time that takes decides between them. Where weights
    alone are, in blocks, these layers get INT8 weights with a scale per channel, and bytes decide.
    """
    recipe, model, scheme = job.recipe, job.model, scheme_of(job.recipe)
    integers = scheme.activation is not None and scheme.activation.mantissa is None and not scheme.simulated
    spare = (integers or scheme.blocked) and not placement_of(recipe).noisy_layers
    if not spare or "auto" not in recipe.spare.split(","):
        return plan
    instead = _int8_weights(model, plan) if scheme.blocked else {}
    limits: dict[str, Any] = {"wanted_db": _WANTED_DB}
    if scheme.blocked:
        more = {layer_of(site): _BYTES_MORE * float(q.scale.size * (q.block or 1)) for site, q in plan.sites.items()}
        limits = {"wanted_db": _WANTED_WEIGHTS_DB, "costs": more, "budget": _BUDGET}
    noisy = job.json(
        "noise",
        [plan.fingerprint, job.images.fingerprint, limits],
        lambda: noisy_layers(model, plan, job.images, **limits, progress=counting(job.watch)),
    )
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


def _assigned(job: Job, plan: QuantPlan) -> QuantPlan:
    """The plan with the formats of `--auto`, INT4 weights among them."""
    recipe, model = job.recipe, job.model
    plans = {plan.scheme: plan}
    narrow = replace(recipe, scheme="w4a16")
    blocks = block_ranges(model.module, blocks_up_to(placement_of(recipe), recipe.block))
    alone = not any(site.endswith(".output") for site in plan.sites)  # INT8 convolutions and INT4: no opset has both
    if blocks and alone and not SCHEMES[plan.scheme].blocked:
        spared = {layer_of(site): why for site, why in plan.spared.items()}
        ranges = Ranges(blocks, plan.model, plan.images, "")
        plans[narrow.scheme] = make_plan(ranges, scheme_of(narrow), spare=spared)
    budget = Budget.of(recipe.max_drop, recipe.min_agreement)

    def choose() -> dict[str, Any]:
        costs, rest = sizes(plans, model), 0.0
        if recipe.least == "latency":
            floats, options = float_stage(model, job.work), BuildOptions(provider=recipe.provider)
            times = layer_times(plans, floats, recipe.backend, options)
            rest = sum(time for layer, time in times["float"].items() if layer not in costs)
            costs = {layer: {name: times[name][layer] for name in own} for layer, own in costs.items()}
        return assign(
            plans,
            costs,
            model,
            job.images,
            budget=budget,
            least=recipe.least,
            rest=rest,
            progress=counting(job.watch),
        ).report()

    facts = [*(p.fingerprint for p in plans.values()), recipe.least, budget.text, recipe.backend, recipe.provider]
    found = Assignment(**job.json("formats", facts, choose))
    job.watch.tell(str(found))
    return apply(found, plans)
