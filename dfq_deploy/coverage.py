"""How far the ranges that one set of images gives hold the values of other sets, site by site.

The formats come from the first set as a calibration's would, and once more from noise, to show what could have been had
for nothing. Then each set passes the model, and at every quantized activation two things are found: the range that it
would have given itself, and how much of it either format cuts off. Streaming: memory holds one batch and one observer
per site. No verdict here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from calibrators.collectors import Subject, described
from calibrators.collectors.pytorch import collect_ranges
from calibrators.cut_off import CutOff, Reach, reach
from calibrators.errors import RecipeError
from calibrators.images import ImageSet
from calibrators.observers import MinMax, observer_named
from calibrators.observing import observed
from calibrators.plan import QuantPlan
from calibrators.scheme import scheme_named
from calibrators.sites import channel_weights, sites_of
from dfq_deploy.choices import observer_of
from dfq_deploy.formats import formats_from
from dfq_deploy.models import Model
from dfq_deploy.recipe import CalibrateRecipe

__all__ = ["NOISE", "OWN", "Held", "SiteCoverage", "check_scheme", "coverage", "observer_used"]

NOISE = "noise"
OWN = "images"


@dataclass(frozen=True)
class Held:
    """How one set fares at one site.

    Attributes:
        low: Lower end of the range that it gives itself.
        high: Upper end.
        drift: How many times as wide the audited range is as this one, as a power of two.
        cut_off_ppm: The share of its values that the audited formats cut off, in parts per million.
        excess_ppm: How much more that is than they cut off of the set that they were made from, 0 at least.
        noise_excess_ppm: The same under the formats that noise would have given.
    """

    low: float
    high: float
    drift: float
    cut_off_ppm: float
    excess_ppm: float
    noise_excess_ppm: float


@dataclass(frozen=True)
class SiteCoverage:
    """One quantized activation.

    Attributes:
        site: Its name.
        own: How the audited images fare under their own formats.
        others: How the other sets do, by name.
    """

    site: str
    own: Held
    others: Mapping[str, Held]


def check_scheme(scheme: str) -> None:
    """Return if the scheme called `scheme` takes ranges of activations.

    Raises:
        RecipeError: It does not.
    """
    asked = scheme_named(scheme)
    if asked.activation is None or asked.dynamic:
        raise RecipeError(
            what=f"`{scheme}` has no ranges to audit.",
            why="run-times find them anew in every call." if asked.dynamic else "it leaves activations in float.",
            fix="pass --scheme w8a8, or another that quantizes activations by ranges.",
        )


def observer_used(recipe: CalibrateRecipe) -> str:
    """The observer that reads ranges here, with what it was set to: PyTorch's, whichever collector is asked for."""
    return described(observer_of(recipe), recipe.percentile, scheme_named(recipe.scheme).activation)


def coverage(
    model: Model,
    recipe: CalibrateRecipe,
    images: ImageSet,
    others: Mapping[str, ImageSet],
    *,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> list[SiteCoverage]:
    """How the formats that `images` give hold the values of `others`, in the order of the model's layers.

    Args:
        model: The model whose activations are quantized.
        recipe: What decides on formats and where they are placed, with a scheme that `check_scheme` passes; ranges are
            read by PyTorch, and layers are spared as `formats_from` does.
        images: The audited images.
        others: Other sets by name, one of them `NOISE`.
        progress: Called with images done and in all.

    Raises:
        PlanError: NaN or Inf passed a site.
    """
    sets = {OWN: images, **others}
    steps = sum(map(len, sets.values())) + len(images) + len(others[NOISE])
    walk = _Walk(model, recipe, lambda done: progress(done, steps))
    plans = {name: walk.plan(sets[name]) for name in (OWN, NOISE)}
    free = [name for name, site in sites_of(model.module).items() if site.role != "weight" and site.fixed is None]
    names = [name for name in free if name in plans[OWN].sites]
    reaches = {site: {name: reach(plans[name].sites[site]) for name in plans} for site in names}
    watched = {name: walk.watch(those, reaches) for name, those in sets.items()}
    return [_site(site, {name: cut_offs[site] for name, cut_offs in watched.items()}) for site in names]


class _Walk:
    """Sets of images pass the model, one after the other; `progress` is told of the images that have, in all."""

    def __init__(self, model: Model, recipe: CalibrateRecipe, progress: Callable[[int], object]) -> None:
        self._model, self._progress, self._done = model, progress, 0
        self._recipe = recipe
        self._codes = scheme_named(recipe.scheme).activation
        self._observer = observer_of(recipe)

    def plan(self, images: ImageSet) -> QuantPlan:
        """The formats that `images` give."""
        recipe, subject = self._recipe, Subject(self._model.module, self._model.fingerprint)
        ranges = collect_ranges(
            subject,
            images,
            observer=self._observer,
            percentile=recipe.percentile,
            codes=self._codes,
            progress=self._tell,
        )
        self._done += len(images)
        return formats_from(recipe, self._model, ranges)

    def watch(self, images: ImageSet, reaches: Mapping[str, Mapping[str, Reach]]) -> dict[str, CutOff]:
        """What the sites in `reaches` saw of `images`."""
        weights = channel_weights(self._model.module)
        watching = {
            site: CutOff(observer_named(self._observer, self._recipe.percentile, self._codes, weights.get(site)), ends)
            for site, ends in reaches.items()
        }
        observed(self._model.module, images, lambda site: watching.get(site) or MinMax(), progress=self._tell)
        self._done += len(images)
        return watching

    def _tell(self, done: int, _total: int) -> None:
        self._progress(self._done + done)


def _site(site: str, watched: Mapping[str, CutOff]) -> SiteCoverage:
    by_choice = {name: watched[name].shares()[name] for name in (OWN, NOISE)}  # of the observer: not to hold all
    ends = {name: _ends(cut_off) for name, cut_off in watched.items()}
    held = {}
    for name, cut_off in watched.items():
        shares = cut_off.shares()
        held[name] = Held(
            *ends[name],
            drift=_drift(ends[OWN], ends[name]),
            cut_off_ppm=_ppm(shares[OWN]),
            excess_ppm=_ppm(max(0.0, shares[OWN] - by_choice[OWN])),
            noise_excess_ppm=_ppm(max(0.0, shares[NOISE] - by_choice[NOISE])),
        )
    return SiteCoverage(site, held.pop(OWN), held)


def _ends(cut_off: CutOff) -> tuple[float, float]:
    low, high = cut_off.range()
    return float(low), float(high)


def _ppm(share: float) -> float:
    return round(1e6 * share, 3)


def _drift(own: tuple[float, float], other: tuple[float, float]) -> float:
    width, wanted = (high - low for low, high in (own, other))
    if width == wanted:
        return 0.0
    return math.log2(width / wanted) if width and wanted else math.copysign(math.inf, width - wanted)
