"""dfq-deploy: quantize a vision transformer with no data, and prove what the engine computes.

The public names, each resolved on first use: importing this package loads neither torch nor timm, so a production
process that only calls `load` never needs them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from calibrators.errors import RecipeError

__version__ = "0.1.0"
__all__ = [
    "AuditRecipe",
    "GateLimits",
    "GeneratorsRecipe",
    "ImageSet",
    "ImageSetReader",
    "Recipe",
    "RepoOptions",
    "Runner",
    "ServeOptions",
    "audit",
    "bench",
    "bench_generators",
    "build",
    "calibrate",
    "check",
    "convert",
    "diagnose",
    "export",
    "gate",
    "generate",
    "infer",
    "load",
    "pack",
    "plot_generators",
    "plot_sensitivity",
    "report",
    "score",
    "sensitivity",
    "serve",
    "serve_repo",
    "simulate",
    "sweep",
    "wrap",
]

if TYPE_CHECKING:
    from dfq_deploy.auditing import audit
    from dfq_deploy.charts.generators import plot_generators
    from dfq_deploy.charts.sensitivity import plot_sensitivity
    from dfq_deploy.converting import ImageSet, ImageSetReader, convert
    from dfq_deploy.doctor import diagnose
    from dfq_deploy.engine_bench import bench
    from dfq_deploy.gating.limits import GateLimits
    from dfq_deploy.gating.running import gate
    from dfq_deploy.generator_bench.recipe import GeneratorsRecipe
    from dfq_deploy.generator_bench.running import bench_generators
    from dfq_deploy.inferring import infer
    from dfq_deploy.layer_costs import sensitivity
    from dfq_deploy.models.wrapping import wrap
    from dfq_deploy.packing import pack
    from dfq_deploy.pipeline import calibrate, check, export, generate, simulate
    from dfq_deploy.recipe import AuditRecipe, Recipe
    from dfq_deploy.reporting.page import report
    from dfq_deploy.runtime import Runner, load
    from dfq_deploy.scoring import score
    from dfq_deploy.serving.options import RepoOptions, ServeOptions
    from dfq_deploy.serving.server import serve
    from dfq_deploy.serving.triton import serve_repo
    from dfq_deploy.sweeping.running import sweep
    from dfq_deploy.target import build

_HOMES = {
    "AuditRecipe": "recipe",
    "GateLimits": "gating.limits",
    "GeneratorsRecipe": "generator_bench.recipe",
    "ImageSet": "converting",
    "ImageSetReader": "converting",
    "Recipe": "recipe",
    "RepoOptions": "serving.options",
    "Runner": "runtime",
    "ServeOptions": "serving.options",
    "audit": "auditing",
    "bench": "engine_bench",
    "bench_generators": "generator_bench.running",
    "build": "target",
    "calibrate": "pipeline",
    "check": "pipeline",
    "convert": "converting",
    "diagnose": "doctor",
    "export": "pipeline",
    "gate": "gating.running",
    "generate": "pipeline",
    "infer": "inferring",
    "load": "runtime",
    "pack": "packing",
    "plot_generators": "charts.generators",
    "plot_sensitivity": "charts.sensitivity",
    "report": "reporting.page",
    "score": "scoring",
    "sensitivity": "layer_costs",
    "serve": "serving.server",
    "serve_repo": "serving.triton",
    "simulate": "pipeline",
    "sweep": "sweeping.running",
    "wrap": "models.wrapping",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    try:
        home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as cause:
        serving = _HOMES[name].startswith("serving.")
        raise RecipeError(
            what=f"`{name}` needs the package `{cause.name}`, which is not installed.",
            why=f"{'serving' if serving else 'making'} an engine takes more than running one.",
            fix=f"pip install 'dfq-deploy[{'serve' if serving else 'export'}]'.",
        ) from cause
    return getattr(home, name)
