"""dfq-deploy: quantize a vision transformer with no data, and prove what the engine computes.

The public names, each resolved on first use: importing this package loads neither torch nor timm, so a production
process that only calls `load` never needs them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from calibrators.errors import RecipeError

__version__ = "0.1.0"
__all__ = [
    "ImageSet",
    "ImageSetReader",
    "Recipe",
    "Runner",
    "audit",
    "build",
    "calibrate",
    "check",
    "convert",
    "diagnose",
    "export",
    "generate",
    "load",
    "plot_sensitivity",
    "sensitivity",
    "simulate",
]

if TYPE_CHECKING:
    from dfq_deploy.auditing import audit
    from dfq_deploy.charts.sensitivity import plot_sensitivity
    from dfq_deploy.converting import ImageSet, ImageSetReader, convert
    from dfq_deploy.doctor import diagnose
    from dfq_deploy.pipeline import calibrate, check, export, generate, sensitivity, simulate
    from dfq_deploy.recipe import Recipe
    from dfq_deploy.runtime import Runner, load
    from dfq_deploy.target import build

_HOMES = {
    "ImageSet": "converting",
    "ImageSetReader": "converting",
    "Recipe": "recipe",
    "Runner": "runtime",
    "audit": "auditing",
    "build": "target",
    "calibrate": "pipeline",
    "check": "pipeline",
    "convert": "converting",
    "diagnose": "doctor",
    "export": "pipeline",
    "generate": "pipeline",
    "load": "runtime",
    "plot_sensitivity": "charts.sensitivity",
    "sensitivity": "pipeline",
    "simulate": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    try:
        home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as cause:
        raise RecipeError(
            what=f"`{name}` needs the package `{cause.name}`, which is not installed.",
            why="making an engine takes more than running one.",
            fix="pip install 'dfq-deploy[export]'.",
        ) from cause
    return getattr(home, name)
