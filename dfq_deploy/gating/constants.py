"""The constants of a bundle's ONNX model, held one by one against the plan and the model's weights.

Images show a scale that is off by two percent; one that is off by a thousandth, or a bias that hardly matters, they do
not. Constants are named by site and by parameter, so each can be held against what it was made from. A name that
neither the plan nor the model knows (the exporter's own shapes) is not looked at.
"""

from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from calibrators.affine import quantize
from calibrators.plan import QuantPlan
from exporters.census import Body

__all__ = ["wrong_constants"]

# Of the largest value: a float32 weight is stored as it is, other bodies keep 11 and 8 bits.
_TOLERANCE: dict[Body, float] = {"fp32": 1e-6, "fp16": 2.0**-11, "bf16": 2.0**-8}


def wrong_constants(
    quantized: ir.Model, plan: QuantPlan, weights: Mapping[str, np.ndarray], *, body: Body
) -> tuple[list[str], int]:
    """What is wrong with which constants, in words, and how many were looked at.

    Args:
        quantized: The bundle's ONNX model.
        plan: The plan that it was made with.
        weights: The parameters that the plan is for, by torch's names.
        body: What is not quantized is kept in this.
    """
    stored = {
        name: value.const_value.numpy()
        for name, value in quantized.graph.initializers.items()
        if value.const_value is not None
    }
    wanted = dict(_of_plan(plan, weights))
    wrong = [f"`{name}` is missing from model.onnx" for name in wanted if name not in stored]
    exact = wanted.keys()
    wanted |= {name: values for name, values in weights.items() if name in stored}
    for name, values in wanted.items():
        if name in stored and not _same(stored[name], values, 0.0 if name in exact else _TOLERANCE[body]):
            wrong.append(f"`{name}` in model.onnx is not what the {'plan' if name in exact else 'model'} says")
    return wrong, len(wanted)


def _of_plan(plan: QuantPlan, weights: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The constants that each site of the plan leads to, in torch's layout."""
    for site, q in plan.sites.items():
        if q.dynamic:
            continue
        yield f"{site}.scale", q.scale
        yield f"{site}.zero_point", q.zero_point
        if site in weights:
            values = weights[site]
            yield f"{site}.{q.codes.name}", quantize(values, *q.along(values.ndim), q.codes)


def _same(stored: np.ndarray, wanted: np.ndarray, tolerance: float) -> bool:
    """Whether both hold the same numbers; MatMul keeps (in, out) where torch has (out, in)."""
    if stored.dtype in (np.float16, ml_dtypes.bfloat16):  # so are the scales of blocks kept, where that loses nothing
        wanted = wanted.astype(stored.dtype)
    allowed = tolerance * float(np.abs(wanted.astype(np.float64)).max(initial=0.0))
    return any(
        form.shape == stored.shape
        and bool((np.abs(stored.astype(np.float64) - form.astype(np.float64)) <= allowed).all())
        for form in (wanted, wanted.T)
    )
