"""What a recipe comes to: its defaults looked up, and whether it can be carried out, whatever the model.

`auto` and `default` stand for what suits the scheme and the backend; here is what that is.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from calibrators.affine import CODES
from calibrators.collectors import Collector
from calibrators.errors import RecipeError
from calibrators.plan import QuantPlan, make_plan
from calibrators.ranges import Ranges, SiteRange
from calibrators.registry import pick
from calibrators.scheme import QuantScheme, scheme_named
from dfq_deploy.recipe import CalibrateRecipe, SimulateRecipe
from exporters.backends import BuildOptions, Placement

__all__ = [
    "blocks_of",
    "blocks_up_to",
    "check_calibration",
    "check_recipe",
    "collector_of",
    "observer_of",
    "passes_of",
    "placement_of",
    "scheme_of",
]


def check_calibration(recipe: CalibrateRecipe) -> None:
    """Return if the collector can begin.

    Raises:
        RecipeError: It has no such observer, or none for the scheme's activations.
        BackendError: Its run-time is missing.
    """
    collector_of(recipe).check(observer_of(recipe), scheme_named(recipe.scheme).activation)


def check_recipe(recipe: CalibrateRecipe, options: BuildOptions) -> None:
    """Return if the collector can begin and the backend takes what the recipe asks for.

    Raises:
        RecipeError: The scheme is simulated only, or the collector has no such observer.
        BackendError: A run-time is missing, or takes no such plan.
    """
    scheme = scheme_named(recipe.scheme)
    if scheme.simulated:
        raise RecipeError(
            what=f"there are no engines in {scheme.name}.",
            why=f"no run-time has such kernels ({scheme.note}).",
            fix=f"see what it would be worth with `dfq-deploy simulate --scheme {scheme.name}`, "
            "or pass --scheme w8a8 or w4a16.",
        )
    check_calibration(recipe)
    backend = pick("exporters.backends", recipe.backend)
    backend.check(_one_layer_plan(recipe), options)
    if recipe.auto and recipe.least == "latency":
        backend.time_layers((), (), options)  # of no models: raises if it cannot


def scheme_of(recipe: CalibrateRecipe) -> QuantScheme:
    """The recipe's scheme, with the weights' zero-points that its run-time takes."""
    scheme = scheme_named(recipe.scheme)
    if isinstance(recipe, SimulateRecipe) and recipe.softmax == "even":
        scheme = replace(scheme, softmax=None)
    asymmetric = scheme.blocked and placement_of(recipe).zero_points
    return replace(scheme, weight=CODES["uint4"]) if asymmetric else scheme


def placement_of(recipe: CalibrateRecipe) -> Placement:
    """What the recipe's run-time wants quantized."""
    found: Placement = pick("exporters.backends", recipe.backend).placement(BuildOptions(provider=recipe.provider))
    return found


def blocks_of(recipe: CalibrateRecipe) -> tuple[int, ...]:
    """Sizes that the blocks of weights may have, if the scheme has any."""
    return blocks_up_to(placement_of(recipe), recipe.block) if scheme_named(recipe.scheme).blocked else ()


def blocks_up_to(placement: Placement, block: int) -> tuple[int, ...]:
    """Sizes that blocks may have: the one asked for and, where that does not fit a layer, smaller ones."""
    return tuple(size for size in placement.blocks if size <= block)


def passes_of(recipe: CalibrateRecipe) -> tuple[str, ...]:
    """Names of the refine passes."""
    if recipe.refine == "none":
        return ()
    if recipe.refine != "default":
        return tuple(recipe.refine.split(","))
    own_ranges = recipe.observer != "auto" or recipe.collector != "pytorch"  # asked for: `reach` would replace them
    return tuple(name for name in scheme_named(recipe.scheme).refine if not (own_ranges and name == "reach"))


def collector_of(recipe: CalibrateRecipe) -> Collector:
    """The recipe's collector."""
    plugin: Any = pick("calibrators.collectors", recipe.collector)
    collector: Collector = plugin
    return collector


def observer_of(recipe: CalibrateRecipe) -> str:
    """The recipe's observer; `auto` is what suits the scheme, where the collector has it."""
    if recipe.observer != "auto":
        return recipe.observer
    suited, offered = scheme_named(recipe.scheme).observer, collector_of(recipe).OBSERVERS
    return suited if suited in offered else offered[0]


def _one_layer_plan(recipe: CalibrateRecipe) -> QuantPlan:
    """What the recipe asks for, of a model with one layer."""
    scheme = scheme_of(recipe)
    width, low, high = 2 * recipe.block, np.full((2, 2), -1.0), np.full((2, 2), 2.0)
    weight = SiteRange(low[0], high[0], "weight", 0, (2, width))
    if scheme.blocked:
        weight = SiteRange(low, high, "weight", 0, (2, width), recipe.block)
    sites = {"layer.input": SiteRange(low[0, 0], high[0, 0], "input", None, (width,)), "layer.weight": weight}
    return make_plan(Ranges(sites, "", "", ""), scheme)
