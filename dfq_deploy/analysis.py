"""Sensitivity analysis: what quantizing each layer does to the outputs, and what sparing it gains.

A plan and a few images go in, labelled or not; which layers and which of their sites hurt comes out. The float model is
what all is compared with. Each number is a forward pass of the reference under a part of the plan, so it says what the
plan does, not what an engine makes of it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from calibrators.files import write_json
from calibrators.folds import layers_of
from calibrators.images import ImageSet
from calibrators.plan import QParams, QuantPlan, layer_of
from calibrators.sites import OperandSites
from dfq_deploy.measures import Share, sqnr_db, without_nan
from dfq_deploy.models import Model
from dfq_deploy.reference import Reference
from dfq_deploy.refined import copy_of
from dfq_deploy.sparing import Massive, massive_activations
from dfq_deploy.tasks import task_named
from exporters.outputs import parts_of

__all__ = [
    "Effect",
    "LayerEffect",
    "Sensitivity",
    "SiteEffect",
    "SparedLayer",
    "analyse",
    "macs_percent",
    "noises",
    "sqnr_on",
]

_FEW = 8  # images that tell how noisy a layer is


@dataclass(frozen=True)
class Effect:
    """What quantizing some sites, with all others in float, does to the outputs, a classifier's logits.

    Attributes:
        noise: Power of their change, |outputs - float|², summed over images.
        sqnr_db: Power of the float outputs over that; infinite where nothing changes.
        agreement: With float, as the task has it: top-1 agreement of a classifier.
    """

    noise: float
    sqnr_db: float
    agreement: Share


@dataclass(frozen=True)
class SiteEffect(Effect):
    """What a site costs: the effect of quantizing it alone.

    Attributes:
        others: All that the plan quantizes but it.
        gain_db: By how much sparing it alone raises the whole plan's SQNR.
    """

    others: Effect
    gain_db: float


@dataclass(frozen=True)
class LayerEffect:
    """What a quantized layer costs.

    Attributes:
        name: The layer, or attention matmul.
        alone: It alone is quantized.
        others: All that the plan quantizes but it.
        gain_db: By how much sparing it raises the whole plan's SQNR.
        noise_percent: Its share of the noise that all layers make, each quantized alone.
        macs_percent: Its share of the model's multiply-accumulates: what sparing it costs in time, roughly.
        sites: Each of its sites.
    """

    name: str
    alone: Effect
    others: Effect
    gain_db: float
    noise_percent: float
    macs_percent: float
    sites: Mapping[str, SiteEffect]


@dataclass(frozen=True)
class SparedLayer:
    """A layer that the plan leaves in float.

    Attributes:
        name: The layer, or attention matmul.
        reason: Why.
        macs_percent: Its share of the model's multiply-accumulates.
        alone: What quantizing it alone would do; None where the ranges for that are not at hand, or no format fits.
    """

    name: str
    reason: str
    macs_percent: float
    alone: Effect | None


@dataclass(frozen=True)
class Sensitivity:
    """Which layers hurt.

    Attributes:
        model: The model's name.
        scheme: The plan's scheme.
        n: Number of images.
        images: Where they come from.
        whole: All that the plan quantizes.
        summed_db: SQNR if the noises of the layers, each quantized alone, just added up. Where it is far from the whole
            plan's, layers amplify or cancel one another's noise.
        layers: The quantized layers, the most harmful first.
        spared: The others, in the model's order.
        massive: Massive activations; they are found on noise, whatever the images.
    """

    model: str
    scheme: str
    n: int
    images: str
    whole: Effect
    summed_db: float
    layers: tuple[LayerEffect, ...]
    spared: tuple[SparedLayer, ...]
    massive: tuple[Massive, ...]

    def report(self) -> dict[str, Any]:
        """The analysis as JSON; None for what is not finite."""
        massive = [finding.report() for finding in self.massive]
        report: dict[str, Any] = without_nan({**asdict(self), "massive": massive})
        return report

    def save(self, path: Path) -> None:
        """Write the report as a JSON file."""
        write_json(path, self.report())


def analyse(
    model: Model,
    plan: QuantPlan,
    images: ImageSet,
    *,
    spared: Mapping[str, QParams],
    refined: Model | None = None,
    floats: Model | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> Sensitivity:
    """Quantize each layer and each site of `plan` alone, and all others without it.

    Args:
        model: The model before any layer was corrected.
        plan: What is quantized, and how.
        images: What to run, real or synthetic; labels are not looked at.
        spared: Formats for sites that the plan spares, as far as they are known.
        refined: The model with the weights that the plan is for, where corrections changed them: a quantized layer has
            its corrected weight, one that stays float does not.
        floats: The model that counts as float, where `model` has a student's weights.
        batch_size: Images per forward pass.
        progress: Called with measurements done and in all.

    Raises:
        PlanError: The plan was made for another model.
    """
    layers = {layer: _sites_of(layer, plan.sites) for layer in plan.layers}
    refused = {layer_of(site): why for site, why in plan.spared.items() if layer_of(site) not in layers}
    possible = {layer: _sites_of(layer, spared) for layer in refused}
    whole = frozenset(plan.sites)
    asked = [whole, *layers.values(), *(whole - sites for sites in layers.values())]
    asked += [frozenset([site]) for site in plan.sites]
    asked += [whole - {site} for site in plan.sites]
    asked += [sites for sites in possible.values() if sites]
    formats = {**spared, **plan.sites}
    macs = macs_percent(model)
    batches = list(images.batches(batch_size))
    refined = refined or model
    mixed = copy_of(refined)
    wanted = _rows(Reference(refined, plan, floats or model).float, batches)
    effects: dict[frozenset[str], Effect] = {}
    todo = dict.fromkeys(asked)
    for done, sites in enumerate(todo, 1):
        part = replace(plan, sites={site: formats[site] for site in sites})
        _give_weights(mixed, {layer_of(site) for site in sites}, refined, model)
        effects[sites] = _effect(_rows(Reference(mixed, part).quantized, batches), wanted, model)
        progress(done, len(todo))
    summed = sum(effects[sites].noise for sites in layers.values())
    found = [
        _layer_effect(name, sites, effects, whole=whole, summed=summed, macs_percent=macs[name])
        for name, sites in layers.items()
    ]
    return Sensitivity(
        model=model.name,
        scheme=plan.scheme,
        n=len(images),
        images=images.source,
        whole=effects[whole],
        summed_db=sqnr_db(float(np.square(wanted).sum()), summed),
        layers=tuple(sorted(found, key=lambda layer: -layer.alone.noise)),
        spared=tuple(SparedLayer(name, why, macs[name], effects.get(possible[name])) for name, why in refused.items()),
        massive=tuple(massive_activations(model)),
    )


def noises(
    model: Model, plan: QuantPlan, images: ImageSet, progress: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Power of the change of the outputs over that of the outputs, per layer, where it alone is quantized.

    A few of `images` tell; `progress` is called after each layer.
    """
    few = list(images.spread(_FEW).batches(_FEW))
    wanted = _rows(Reference(model, plan).float, few)
    power = float(np.square(wanted).sum())
    found = {}
    for layer in plan.layers:
        sites = {site: plan.sites[site] for site in _sites_of(layer, plan.sites)}
        found[layer] = (
            _effect(_rows(Reference(model, replace(plan, sites=sites)).quantized, few), wanted, model).noise / power
        )
        progress()
    return found


def sqnr_on(model: Model, plan: QuantPlan, images: ImageSet, batch_size: int = 16) -> float:
    """SQNR of the outputs under `plan`, in dB."""
    batches = list(images.batches(batch_size))
    reference = Reference(model, plan)
    return _effect(_rows(reference.quantized, batches), _rows(reference.float, batches), model).sqnr_db


def _give_weights(mixed: Model, quantized: set[str], refined: Model, model: Model) -> None:
    """Give the layers `quantized` of `mixed` the weights of `refined`, and the others those of `model`."""
    corrected, plain = layers_of(refined.module), layers_of(model.module)
    for name, layer in layers_of(mixed.module).items():
        layer.load_state_dict((corrected if name in quantized else plain)[name].state_dict())


def _sites_of(layer: str, sites: Iterable[str]) -> frozenset[str]:
    return frozenset(site for site in sites if layer_of(site) == layer)


def _rows(run: Callable[[np.ndarray], np.ndarray], batches: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([run(batch) for batch in batches]).astype(np.float64)


def _effect(found: np.ndarray, wanted: np.ndarray, model: Model) -> Effect:
    noise = float(np.square(found - wanted).sum())
    parts = (parts_of(rows, model.outputs) for rows in (found, wanted))
    agreement = Share.of(task_named(model.task).agree(*parts))
    return Effect(noise, sqnr_db(float(np.square(wanted).sum()), noise), agreement)


def macs_percent(model: Model) -> dict[str, float]:
    """Share of the model's multiply-accumulates, in percent, by layer and attention matmul.

    torch counts them. The fused attention kernel is taken apart so that every version of torch counts its two matmuls;
    they are of one size.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.module(torch.zeros(1, *model.preprocess.shape))
    counts = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    total = counter.get_total_flops()
    for name, module in model.module.named_modules():
        if any(isinstance(child, OperandSites) for child in module.children()):
            children = (f"{name}.{child}" for child, _ in module.named_children())
            matmuls = counts.get(name, 0) - sum(counts.get(child, 0) for child in children)
            counts |= {f"{name}.qk": matmuls / 2, f"{name}.av": matmuls / 2}
    return {name: round(100 * count / total, 3) for name, count in counts.items()}


def _layer_effect(
    name: str,
    sites: frozenset[str],
    effects: Mapping[frozenset[str], Effect],
    *,
    whole: frozenset[str],
    summed: float,
    macs_percent: float,
) -> LayerEffect:
    alone, others, at_first = effects[sites], effects[whole - sites], effects[whole].sqnr_db

    def of(site: str) -> SiteEffect:
        effect, rest = effects[frozenset([site])], effects[whole - {site}]
        return SiteEffect(effect.noise, effect.sqnr_db, effect.agreement, rest, round(rest.sqnr_db - at_first, 2))

    return LayerEffect(
        name=name,
        alone=alone,
        others=others,
        gain_db=round(others.sqnr_db - at_first, 2),
        noise_percent=round(100 * alone.noise / summed, 2) if summed else 0.0,
        macs_percent=macs_percent,
        sites={site: of(site) for site in sorted(sites)},
    )
