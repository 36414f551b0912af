"""The census: what a built engine really computes in, layer by layer, held against the plan.

A run-time is free to compute a layer in float although its Q/DQ is there, and none says so. A backend reports what
it found in the graph that it runs; this file says whether that is what the plan asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from calibrators.errors import ExportError
from calibrators.plan import QuantPlan, layer_of

__all__ = ["Census", "Precision"]

Precision = Literal["int8", "float"]


@dataclass(frozen=True)
class Census:
    """Precision of every layer that has sites.

    Attributes:
        precision: `int8` or `float` by layer.
        reasons: Why a layer is float: the plan's reason, or what the run-time's graph shows.
    """

    precision: Mapping[str, Precision]
    reasons: Mapping[str, str]

    @classmethod
    def of(cls, plan: QuantPlan, found: Mapping[str, str]) -> "Census":
        """The census of an engine in which `found` gives, per planned layer, an empty string or why it is float.

        Raises:
            ExportError: A layer that the plan quantizes is computed in float.
        """
        fallen = [layer for layer in plan.layers if found[layer]]
        if fallen:
            raise ExportError(
                what=f"the engine computes `{fallen[0]}` in float, and {len(fallen) - 1} more layers of the plan.",
                why=found[fallen[0]],
                fix=f"spare them with --spare {','.join(fallen)}, or use another backend.",
            )
        precision: dict[str, Precision] = dict.fromkeys(plan.layers, "int8")
        spared = {layer_of(site): reason for site, reason in plan.spared.items()}
        precision.update({layer: "float" for layer in spared if layer not in precision})
        return cls(precision, spared)

    @property
    def counts(self) -> dict[str, int]:
        """Number of layers per precision: `int8` and `float`."""
        found = list(self.precision.values())
        return {kind: found.count(kind) for kind in ("int8", "float")}
