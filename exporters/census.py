"""The census: what a built engine really computes in, layer by layer, held against the plan.

A run-time is free to compute a layer in float although its Q/DQ is there, and none says so. A backend reports what
it found in the engine that it built; this file says whether that is what the plan asked for.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from calibrators.errors import ExportError
from calibrators.plan import QuantPlan, layer_of

__all__ = ["Body", "Census", "Precision", "is_weight_only", "precision_of"]

Body = Literal["fp32", "fp16", "bf16"]
Precision = Literal["int8", "int4", "fp8", "fp32", "fp16", "bf16"]
_PRECISIONS: dict[str, Precision] = {
    "int8": "int8",
    "uint8": "int8",
    "int4": "int4",
    "uint4": "int4",
    "float8_e4m3fn": "fp8",
}


def precision_of(plan: QuantPlan, layer: str) -> Precision:
    """What the plan wants `layer` to be computed in, or its weight to be kept in where activations stay float."""
    return _PRECISIONS[plan.codes_of(layer).name]


def is_weight_only(plan: QuantPlan, layer: str) -> bool:
    """Whether the plan leaves the input of `layer`, whose weight it quantizes, in float."""
    return f"{layer}.weight" in plan.sites and f"{layer}.input" not in plan.sites


@dataclass(frozen=True)
class Census:
    """What every layer that has sites is computed in.

    Attributes:
        precision: By layer; its weight's format where the plan leaves activations in float. Empty where no engine was
            seen.
        reasons: Why a layer is float, or finer than was asked for: the plan's reason.
        kernels: How many kernels of which kind the engine has, where the run-time says.
    """

    precision: Mapping[str, Precision]
    reasons: Mapping[str, str]
    kernels: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        plan: QuantPlan,
        found: Mapping[str, str],
        *,
        body: Body = "fp32",
        kernels: Mapping[str, int] | None = None,
    ) -> "Census":
        """The census of an engine.

        Args:
            plan: What was asked for.
            found: Per planned layer an empty string, or why the engine computes it in float.
            body: What the rest is computed in.
            kernels: How many kernels of which kind there are.

        Raises:
            ExportError: A layer that the plan quantizes is computed in float.
        """
        fallen = [layer for layer in plan.layers if found[layer]]
        if fallen:
            raise ExportError(
                what=f"the engine computes `{fallen[0]}` in float, and {len(fallen) - 1} more layers of the plan.",
                why=found[fallen[0]],
                fix=f"spare them with --spare auto,{','.join(fallen)}, or use another backend.",
            )
        precision = {layer: precision_of(plan, layer) for layer in plan.layers}
        spared = {layer_of(site): reason for site, reason in plan.spared.items()}
        precision.update({layer: body for layer in spared if layer not in precision})
        return cls(precision, spared, kernels or {})

    @property
    def counts(self) -> dict[str, int]:
        """Number of layers per precision, the quantized ones first."""
        found = Counter(self.precision.values())
        return {kind: found[kind] for kind in ("int8", "int4", "fp8", "fp32", "fp16", "bf16") if found[kind]}
