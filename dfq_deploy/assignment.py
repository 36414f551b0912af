"""Which format each layer gets: of all assignments whose predicted loss fits a budget, the fastest or the smallest.

What a layer costs in accuracy in each format is measured on the calibration images, what it costs in time by the
run-time itself; what comes out is one plan that may hold several formats. Noises of layers add up, and so do times,
which makes the choice a knapsack problem with exact solutions.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from calibrators.errors import PlanError
from calibrators.images import ImageSet
from calibrators.plan import QParams, QuantPlan, layer_of
from dfq_deploy.analysis import macs_percent, noises, sqnr_on
from dfq_deploy.models import Model
from exporters.census import precision_of

__all__ = ["Assignment", "Budget", "apply", "assign", "noisy_layers", "sizes"]

_CHANGED = 0.37  # share of decisions that change, per noise-to-signal amplitude of the logits; see `Budget`
_LOST = 0.15  # top-1 points lost per point of changed decisions; see `Budget`
_TIGHTER = 0.95
_UNITS = {"latency": "ms", "size": "MiB"}


@dataclass(frozen=True)
class Budget:
    """What quantization may cost.

    Predicted, since nobody has labelled images here, and roughly. Two relations stand behind it. The share of changed
    decisions grows with the amplitude of the logits' noise: 0.37 times noise over signal on the calibration images is
    what ViT-Ti's default export gave; seven INT8 plans of DeiT-Ti, on 307 real images, gave 0.32 to 0.57. And some 15 %
    of changed decisions are lost ones, the others were wrong before or stay right: chosen by us, among those seen.

    Attributes:
        text: The flag that set it.
        changed: Share of decisions that may differ from float.
    """

    text: str
    changed: float

    @classmethod
    def of(cls, max_drop: float, min_agreement: float | None) -> "Budget":
        """The budget of `max_drop` points of top-1, or of an agreement with float of `min_agreement` percent."""
        if min_agreement is not None:
            return cls(f"--min-agreement {min_agreement:g}", 1 - min_agreement / 100)
        return cls(f"--max-drop {max_drop:g}", max_drop / 100 / _LOST)

    @property
    def wanted_db(self) -> float:
        """SQNR of the logits on the calibration images that it asks for."""
        return 20 * math.log10(_CHANGED / self.changed)


@dataclass(frozen=True)
class Assignment:
    """Formats by layer, with what spoke for them.

    Attributes:
        least: What was made small: `latency` (milliseconds for one image) or `size` (MiB).
        budget: The flag that set the budget.
        formats: Per layer the name of a plan, or `float`.
        noise: Per layer and plan, what the layer alone takes of the budget; 1 is all of it.
        costs: Per layer and plan, and for `float`: milliseconds or MiB.
        total: Cost of the whole, and of the whole with every layer in one format, by plan.
        sqnr_db: Of the logits on the calibration images, under the assignment.
        changed: Predicted share of decisions that differ from float.
    """

    least: str
    budget: str
    formats: Mapping[str, str]
    noise: Mapping[str, Mapping[str, float]]
    costs: Mapping[str, Mapping[str, float]]
    total: Mapping[str, float]
    sqnr_db: float
    changed: float

    def report(self) -> dict[str, Any]:
        """The assignment as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        counts = Counter(self.formats.values())
        unit = _UNITS[self.least]
        others = ", ".join(f"{cost:.3g} all in {name}" for name, cost in self.total.items() if name != "this")
        return (
            f"{', '.join(f'{count} layers in {name}' for name, count in counts.most_common())}: "
            f"{self.total['this']:.3g} {unit} ({others}). Predicted: {100 * (1 - self.changed):.1f} % agreement with "
            f"float, {100 * _LOST * self.changed:.2f} points of top-1 lost (the logits keep {self.sqnr_db} dB on the "
            "calibration images)."
        )

    def why_float(self, layer: str) -> str:
        """Why a layer was left in float."""
        costs, unit = self.costs[layer], _UNITS[self.least]
        gains = {name: costs["float"] - cost for name, cost in costs.items() if name != "float"}
        said = [
            f"{name} would take {self.noise[layer][name]:.0%} of {self.budget} and save {gain:.3g} {unit}"
            for name, gain in gains.items()
            if gain > 0
        ]
        return "; ".join(said) or f"no format saves {'time' if self.least == 'latency' else 'space'} here"


def assign(
    plans: Mapping[str, QuantPlan],
    costs: Mapping[str, Mapping[str, float]],
    model: Model,
    images: ImageSet,
    *,
    budget: Budget,
    least: str,
    rest: float,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> Assignment:
    """The cheapest assignment whose noise fits the budget.

    Args:
        plans: Candidate formats by name.
        costs: Per layer the cost in each plan that quantizes it, and in `float`.
        model: The model that the plans are for.
        images: What noise is measured on.
        budget: What may be lost.
        least: What `costs` are, `latency` or `size`.
        rest: Cost of all that has no choice.
        progress: Called with measurements done and in all.

    Raises:
        PlanError: The budget leaves no layer to quantize.
    """
    step = _counted(progress, sum(len(plan.layers) for plan in plans.values()))
    noise: dict[str, dict[str, float]] = {layer: {} for layer in costs}
    for name, plan in plans.items():
        for layer, value in noises(model, plan, images, step).items():
            noise[layer][name] = value
    allowed = 10 ** (-budget.wanted_db / 10)
    found, made, left = 0.0, math.inf, allowed
    while made > allowed:
        formats = _cheapest(costs, noise, left)
        if set(formats.values()) == {"float"}:
            raise PlanError(
                what=f"{budget.text} leaves no layer to quantize.",
                why=f"it asks for {budget.wanted_db:.1f} dB in the logits on the calibration images.",
                fix="allow more, or export with --scheme float.",
            )
        found = sqnr_on(model, _merged(plans, formats), images)
        made = 10 ** (-found / 10)
        left *= _TIGHTER * allowed / made  # where noises did not just add up
    total = {"this": rest + sum(costs[layer][name] for layer, name in formats.items())}
    for name in ("float", *plans):
        total[name] = rest + sum(cost.get(name, cost["float"]) for cost in costs.values())
    return Assignment(
        least=least,
        budget=budget.text,
        formats=formats,
        noise={layer: {name: value / allowed for name, value in own.items()} for layer, own in noise.items()},
        costs=costs,
        total=total,
        sqnr_db=found,
        changed=_CHANGED * 10 ** (-found / 20),
    )


def apply(assignment: Assignment, plans: Mapping[str, QuantPlan]) -> QuantPlan:
    """One plan with the format of each layer as assigned; it bears the name of the first scheme."""
    return _merged(plans, assignment.formats, assignment.why_float)


def sizes(plans: Mapping[str, QuantPlan], model: Model) -> dict[str, dict[str, float]]:
    """MiB of each layer's weight in each plan that quantizes it, scales included, and in `float`."""
    found: dict[str, dict[str, float]] = {}
    for name, plan in plans.items():
        for layer in plan.layers:
            qparams = plan.sites.get(f"{layer}.weight")
            weights = model.module.get_parameter(f"{layer}.weight") if qparams else None
            count = weights.numel() if weights is not None else 0
            bits = 4 if precision_of(plan, layer) == "int4" else 8
            scales = 0 if qparams is None else qparams.scale.nbytes + qparams.zero_point.size * bits / 8
            own = found.setdefault(layer, {"float": 4 * count / 2**20})
            own[name] = (count * bits / 8 + scales) / 2**20
    return found


def noisy_layers(
    model: Model,
    plan: QuantPlan,
    images: ImageSet,
    *,
    wanted_db: float,
    costs: Mapping[str, float] | None = None,
    budget: float = math.inf,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> dict[str, str]:
    """The layers without which the rest of `plan` keeps the logits' SQNR at `wanted_db`, with the reason.

    Layers go in the order of noise per cost, so that as little as may be is given for the SQNR; one that the budget has
    no room for stays.

    Args:
        model: The model that the plan is for.
        plan: What is quantized, and how.
        images: Calibration images.
        wanted_db: The SQNR.
        costs: What each layer costs if it is spared; None for its multiply-accumulates, hence time.
        budget: What they may cost together.
        progress: Called with layers done and in all.
    """
    noise = noises(model, plan, images, _counted(progress, len(plan.layers)))
    costs = costs or {layer: max(macs, 1e-3) for layer, macs in macs_percent(model).items()}
    left = total = sum(noise.values())
    found = {}
    for layer in sorted(noise, key=lambda layer: -noise[layer] / costs[layer]):
        if left <= 10 ** (-wanted_db / 10):
            break
        if costs[layer] > budget:
            continue
        budget -= costs[layer]
        left -= noise[layer]
        found[layer] = f"it makes {noise[layer] / total:.0%} of the noise in the logits"
    return found


def _counted(progress: Callable[[int, int], object], total: int) -> Callable[[], object]:
    """What tells `progress` how often it was called."""
    done = itertools.count(1)
    return lambda: progress(next(done), total)


def _cheapest(
    costs: Mapping[str, Mapping[str, float]], noise: Mapping[str, Mapping[str, float]], allowed: float
) -> dict[str, str]:
    """Per layer the format with which the sum of costs is least while that of noises is at most `allowed`."""
    choices = [(layer, name) for layer, own in costs.items() for name in own]
    price = np.array([costs[layer][name] for layer, name in choices])
    loud = np.array([0.0 if name == "float" else noise[layer][name] for layer, name in choices])
    one_each = np.array([[float(layer == of) for of, _ in choices] for layer in costs])
    found = milp(
        price / (price.max() or 1.0),
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(np.minimum(loud / allowed, 2)[None], ub=1)],
    )
    assert found.success, found.message  # all in float is always a solution
    return {layer: name for (layer, name), taken in zip(choices, found.x, strict=True) if taken > 0.5}


def _merged(
    plans: Mapping[str, QuantPlan], formats: Mapping[str, str], why_float: Callable[[str], str] = lambda _: ""
) -> QuantPlan:
    """The sites of each layer from the plan that `formats` names; what only another plan spares has its reason gone."""
    first, *_ = plans.values()
    sites: dict[str, QParams] = {}
    spared: dict[str, str] = {}
    for site in dict.fromkeys([*first.sites, *first.spared]):
        name = formats.get(layer_of(site))
        if name is None:
            spared[site] = first.spared[site]
        elif name == "float":
            spared[site] = why_float(layer_of(site))
        elif site in plans[name].sites:
            sites[site] = plans[name].sites[site]
    return replace(first, sites=sites, spared=spared)
