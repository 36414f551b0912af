"""Engine, reference and float model on the same images, and what that says of the engine.

An engine never equals its reference to the last bit, and rounding flips compound through a network. So the verdict
rests on two things. Each layer, fed the reference's own input, must agree to float32 rounding. And the whole engine
must be no further from the reference than the noise floor, up to a factor of two that the number of images must be able
to resolve: the reference's distance from itself when its input moves by a relative 1e-6 or, for an fp16 or bf16 body,
when what its modules put out is rounded to that. Which decisions a move changes is chance, so the floor is the mean of
several moves, where the images are not many.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from scipy import stats

from calibrators.errors import ExportError
from calibrators.images import ImageSet
from calibrators.plan import QuantPlan
from dfq_deploy.differences import Differences
from dfq_deploy.disagreements import Disagreement, disagreements
from dfq_deploy.logits import logits_by_batch
from dfq_deploy.measures import Share, without_nan
from dfq_deploy.reference import Reference
from dfq_deploy.stage_costs import StageCost
from dfq_deploy.statistics import Paired
from dfq_deploy.tasks import task_named
from exporters.backends import Engine
from exporters.bundle import EngineFacts
from exporters.census import Body, precision_of
from exporters.cut import LayerCutter

__all__ = ["FLOOR_FACTOR", "Check", "Verdict", "evaluate", "floor_verdict", "layer_tolerance"]

FLOOR_FACTOR = 2.0  # how many noise floors an engine may be away
_FEWEST = 6  # images: were all on one side, that is 2 * (1/2)^n by chance, under 5 % from here on
_NEGLIGIBLE = 0.01  # a distance below this share of what quantization itself changes is no difference
# Relative to a layer's largest output. float32 sums of some thousand terms differ by 1e-6; fp16 and bf16 keep 11 and 8
# bits of a weight, an input and an output.
_LAYER_TOLERANCE: dict[Body, float] = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 1.6e-2}
_SEED = 0
_PAIRS = {
    "engine_reference": ("engine", "reference"),
    "engine_float": ("engine", "float"),
    "noise_floor": ("moved", "reference"),
    "quantization": ("reference", "float"),
}

Verdict = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True)
class Check:
    """What a check found.

    Attributes:
        n: Number of images.
        images: Where they come from.
        top1: Label accuracy of float, reference and engine; None without labels.
        drop: Points that the engine loses against float, paired per image, (value, low, high); None without labels.
        agreement: As the task has it, top-1 agreement of a classifier: engine_reference, engine_float, and noise_floor
            (reference with itself moved, the mean of its moves).
        distance: Mean of |a - b|² / |b|² over an output for an image, for the same three pairs.
        cosine: Mean cosine of the outputs, for the same three pairs.
        floor_ratio: Engine's distance over the noise floor's, (value, low, high).
        sqnr_db: Signal to quantization noise of all that is put out, for engine_reference and engine_float.
        engine: How far the engine is, and what its layers are computed in.
        ran: What was compared as the engine: the engine, or `model.onnx` in ONNX Runtime where that cannot run here.
        layer_error: Largest deviation of each layer from its reference on the same input, relative to its largest
            output; where the output is rounded, what goes beyond one code.
        verdict: `pass`, `fail` or `undecided`.
        reason: The verdict in words.
        student: Engine and reference have the weights of a student that came with the images, float the model's own.
        negligible: Whether the engine's distance is so small a share of what quantization changes that it is none.
        disagreed: On how many images the engine decides otherwise than float or the reference.
        disagreements: Up to 24 of them.
        stages: What each stage took that led here.
        task: What the outputs are.
        finite: Whether all that the engine puts out are numbers.
    """

    n: int
    images: str
    top1: Mapping[str, Share] | None
    drop: tuple[float, float, float] | None
    agreement: Mapping[str, Share]
    distance: Mapping[str, float]
    cosine: Mapping[str, float]
    floor_ratio: tuple[float, float, float]
    sqnr_db: Mapping[str, float]
    engine: EngineFacts
    ran: str
    layer_error: Mapping[str, float]
    verdict: Verdict
    reason: str
    student: bool = False
    negligible: bool = False
    disagreed: int = 0
    disagreements: tuple[Disagreement, ...] = ()
    stages: Mapping[str, StageCost] = field(default_factory=dict)
    task: str = "classification"
    finite: bool = True

    def report(self) -> dict[str, Any]:
        """The check as JSON: percentages plain, their intervals beside them, None for what is not finite."""
        shares = {**{f"top1_{k}": v for k, v in (self.top1 or {}).items()}, **self.agreement}
        found = {
            **asdict(self),
            "top1": {k: v.percent for k, v in self.top1.items()} if self.top1 else None,
            "agreement": {k: v.percent for k, v in self.agreement.items()},
            "intervals_95": {name: [share.low, share.high] for name, share in shares.items()},
            "engine": self.engine.report(),
            "stages": {name: cost._asdict() for name, cost in self.stages.items()},
        }
        cleaned: dict[str, Any] = without_nan(found)
        return cleaned


def evaluate(
    reference: Reference,
    engine: Engine,
    images: ImageSet,
    *,
    quantized: ir.Model,
    facts: EngineFacts,
    absent: str | None = None,
    logits: Iterable[Mapping[str, np.ndarray]] | None = None,
    progress: Callable[[int, int], object] = lambda *_: None,
    see: Callable[[Mapping[str, np.ndarray]], object] = lambda _: None,
) -> Check:
    """Compare an engine with its reference and with the float model.

    Args:
        reference: The torch model under the plan that the engine was built from.
        engine: The loaded engine, or a stand-in.
        images: What to compare on, real or synthetic, labelled or not.
        quantized: The ONNX model that the engine was built from; its layers are compared one by one.
        facts: How far the engine is, and what its layers are computed in.
        absent: Why the engine cannot run here; `engine` is then ONNX Runtime with `quantized`, as a stand-in. None if
            it is the engine.
        logits: What `logits_by_batch` gives for these images, computed elsewhere. None: it is computed here.
        progress: Called with images done and in all.
        see: Called with the classes (n,) that `float`, `reference` and `engine` decide for, and (k, n) of `moved`: the
            reference with its input moved; with none where the task has no one class for an image.

    Raises:
        ExportError: What ONNX calls a layer is another operation than in torch.
    """
    model, body = reference.model, facts.options.body
    seen, finite = Differences(task_named(model.task), model.outputs, _PAIRS), True
    if logits is None:
        logits = logits_by_batch(reference, engine, images.pixels, body, progress=progress)
    for batch in logits:
        finite &= bool(np.isfinite(batch["engine"]).all())
        seen.add(batch)
    decisive = seen.logits
    see({name: values.argmax(-1) for name, values in decisive.items()})
    layer_error = _layer_errors(reference, LayerCutter(quantized, exact=absent is not None), images.pixels[:1])
    tolerance = {layer: layer_tolerance(reference.plan, layer, body) for layer in layer_error}
    ran = "the engine" if absent is None else "model.onnx in ONNX Runtime"
    found = _judged(seen, decisive, images, facts, layer_error, tolerance, ran)
    found = replace(found, task=model.task, finite=finite)
    if not finite:
        found = replace(found, verdict="fail", reason=f"{ran} puts out NaN or Inf")
    return found if absent is None else _not_run(found, absent)


def _judged(
    seen: Differences,
    logits: Mapping[str, np.ndarray],
    images: ImageSet,
    facts: EngineFacts,
    layer_error: Mapping[str, float],
    tolerance: Mapping[str, float],
    ran: str,
) -> Check:
    distances = {name: seen.distance(name) for name in _PAIRS}
    ratio = _ratio_of_means(distances["engine_reference"], distances["noise_floor"])
    none = float(distances["engine_reference"].mean()) <= _NEGLIGIBLE * float(distances["quantization"].mean())
    top1 = drop = None
    if images.labels is not None:
        hits = {name: logits[name].argmax(-1) == images.labels for name in ("float", "reference", "engine")}
        top1 = {name: Share.of(hit) for name, hit in hits.items()}
        drop = Paired.of(hits["float"], hits["engine"]).drop
    verdict, reason = _verdict(layer_error, tolerance, ratio, none, ran)
    disagreed, shown = disagreements(logits, images) if logits else (0, ())
    told = [name for name in _PAIRS if name != "quantization"]
    return Check(
        n=len(images),
        images=images.source,
        top1=top1,
        drop=drop,
        agreement={name: Share.of(seen.agreement(name)) for name in told},
        distance={name: float(distances[name].mean()) for name in told},
        cosine={name: float(seen.cosine(name).mean()) for name in told},
        floor_ratio=ratio,
        sqnr_db={name: seen.sqnr_db(name) for name in ("engine_reference", "engine_float")},
        engine=facts,
        ran=ran,
        layer_error=layer_error,
        verdict=verdict,
        reason=reason,
        negligible=none,
        disagreed=disagreed,
        disagreements=shown,
    )


def _not_run(found: Check, why: str) -> Check:
    """The check of a stand-in: it can show that the engine would be wrong, not that it is right."""
    verdict: Verdict = "undecided" if found.verdict == "pass" else found.verdict
    return replace(found, verdict=verdict, reason=f"the engine has not run: {why} But {found.reason}")


def layer_tolerance(plan: QuantPlan, layer: str, body: Body) -> float:
    """What a layer may be off by, relative to its largest output.

    A weight-only layer computes in the body's type, any other one in integers and float32.
    """
    return _LAYER_TOLERANCE[body if precision_of(plan, layer) == "int4" else "fp32"]


def _verdict(
    layer_error: Mapping[str, float],
    tolerance: Mapping[str, float],
    ratio: tuple[float, float, float],
    negligible: bool,
    ran: str,
) -> tuple[Verdict, str]:
    wrong = {layer: error for layer, error in layer_error.items() if error > tolerance[layer]}
    if wrong:
        worst = max(wrong, key=lambda layer: wrong[layer])
        return "fail", f"layer {worst} is off by {wrong[worst]:.1e} of its largest output on the same input"
    verdict, reason = floor_verdict(ratio, negligible, ran)
    joint = {"pass": "every layer agrees and", "fail": "every layer agrees, but", "undecided": "every layer agrees;"}
    return verdict, f"{joint[verdict]} {reason}{': use more images' if verdict == 'undecided' else ''}"


def floor_verdict(ratio: tuple[float, float, float], negligible: bool, ran: str) -> tuple[Verdict, str]:
    """Whether the engine is within the noise floor, by its distance in floors, and why."""
    value, low, high = ratio
    if negligible:
        return "pass", f"{ran} differs by under {_NEGLIGIBLE:.0%} of what quantization changes"
    measured = f"{ran} is {value:.2f} noise floors from the reference (95 % interval {low:.2f} to {high:.2f})"
    if low > FLOOR_FACTOR:
        return "fail", measured
    return ("undecided" if high > FLOOR_FACTOR else "pass"), measured


def _layer_errors(reference: Reference, cutter: LayerCutter, images: np.ndarray) -> dict[str, float]:
    errors: dict[str, float] = {}

    def compare(layer: str, operands: list[np.ndarray], wanted: np.ndarray) -> None:
        found = cutter.run(layer, operands)
        if found.size != wanted.size:
            raise ExportError(
                what=f"layer `{layer}` puts out {found.shape} in ONNX and {wanted.shape} in torch, on the same input.",
                why="an operator before it, such as padding, was merged into it, and its input is another tensor.",
                fix=f"add --spare auto,{layer}, so that it stays float.",
            )
        largest = float(np.abs(wanted).max()) or 1.0
        error = float(np.abs(found.reshape(wanted.shape) - wanted).max())
        if rounded := reference.plan.sites.get(f"{layer}.output"):  # may land on the neighbouring code
            error = max(0.0, error - float(rounded.scale))
        errors[layer] = max(errors.get(layer, 0.0), math.inf if math.isnan(error) else error / largest)

    reference.watch_layers(images, compare)
    return errors


def _ratio_of_means(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Mean of `a` over mean of `b` with the interval of a paired bootstrap, which is open where the images are too few.

    A bootstrap knows no values but those that it saw: what four images happened to have says little of others.
    """

    def ratio(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(first.mean(axis) / np.maximum(second.mean(axis), 1e-15))

    if len(a) < _FEWEST or np.isnan(a).any():
        return float(ratio(a, b)), 0.0, float("inf")
    interval = stats.bootstrap(
        (a, b), ratio, paired=True, method="percentile", batch=100, rng=np.random.default_rng(_SEED)
    ).confidence_interval
    return float(ratio(a, b)), float(interval.low), float(interval.high)
