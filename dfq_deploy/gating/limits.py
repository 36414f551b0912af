"""What a gate lets pass: the options that a person may set, validated once."""

import math
from dataclasses import dataclass, fields

from calibrators.errors import RecipeError

__all__ = ["GateLimits"]


@dataclass(frozen=True, kw_only=True)
class GateLimits:
    """What a gate lets pass.

    Attributes:
        max_drop: Points of top-1 that the engine may differ by from float and from the baseline, either way. The
            default is what 921 images can show of a good INT8 engine.
        min_agreement: Percentage of decisions that engine and float must share. The default is what 32 images can show:
            it catches a broken engine, not one that is a little worse.
        size_band: Percent by which the engine's size may differ from the baseline's, either way.
        latency_band: Percent by which its time, relative to float, may differ from the baseline's, either way.
    """

    max_drop: float = 1.5
    min_agreement: float = 80.0
    size_band: float = 5.0
    latency_band: float = 25.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, top = getattr(self, field.name), math.inf if field.name.endswith("band") else 100.0
            if not 0.0 < value <= top or math.isinf(value):
                raise RecipeError(
                    what=f"--{field.name.replace('_', '-')} {value:g} is no limit.",
                    why="it is a number of points or percent"
                    + (" above 0." if math.isinf(top) else " above 0 and up to 100."),
                    fix=f"leave it out for {field.default:g}, or pass another.",
                )
