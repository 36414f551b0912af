"""Pictures as parts of the page: images as data URIs, charts of layers and of ranges as SVG."""

import base64
import io
import math
from collections.abc import Container, Iterable

from PIL import Image

from dfq_deploy.audited import SEED
from dfq_deploy.charts.panels import Panel, Series, draw_panels
from dfq_deploy.charts.sets import NAMES
from dfq_deploy.coverage import NOISE
from dfq_deploy.reporting.checked import Audited, Sensed
from dfq_deploy.reporting.layers import kinds_of

__all__ = ["data_uri", "draw_ranges", "draw_sensitivity"]

_QUALITY = 82  # of WebP, which every browser of the last years shows
_SETS = {NOISE: ("float", "x"), SEED: ("reference", "D")}
_REAL = ("bad", "s")
_MARKS = {"input": "v", "weight": "o", "output": "s", "lhs": "<", "rhs": ">"}


def data_uri(image: Image.Image, longest: int) -> str:
    """`image`, its longer side at most `longest` pixels, as a `data:` URI."""
    shown = image.copy()
    shown.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    shown.convert("RGB").save(out, format="webp", quality=_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def draw_sensitivity(sensed: Sensed, order: Iterable[str]) -> str:
    """How much each layer hurts: a bar per layer, marks for its sites, a panel per kind.

    Args:
        sensed: What the layers cost.
        order: All layers, as the map has them.
    """
    quantized = {layer.name: _number(layer.alone.sqnr_db) for layer in sensed.layers}
    spared = {layer.name: _number(layer.alone.sqnr_db) for layer in sensed.spared if layer.alone}
    sites: dict[str, dict[str, float]] = {role: {} for role in sensed.roles}
    for layer in sensed.layers:
        for site, effect in layer.sites.items():
            sites[site.rpartition(".")[2]][layer.name] = _number(effect.sqnr_db)
    whole = _number(sensed.whole.sqnr_db)
    return draw_panels(
        _panels(order, {**quantized, **spared}),
        [
            Series("quantized, alone", "engine", quantized),
            Series("stays float: if it were", "reference", spared, "hatch"),
            *(Series(f"its {called} alone", "ink", sites[role], _MARKS[role]) for role, called in sensed.roles.items()),
        ],
        key="sensitivity",
        axis="SQNR of the logits, dB",
        says="Bars, one per layer, a panel per kind of layer: how much quantizing it alone hurts. "
        "The table below has the figures.",
        down=True,
        line=(f"all together: {whole:.1f} dB", whole) if math.isfinite(whole) else None,
    )


def draw_ranges(audit: Audited) -> str:
    """How wide the ranges are that the images give, against those that other images give, site by site."""
    names = [site.site.removesuffix(".input") for site in audit.sites]
    series = []
    for name in audit.others:
        colour, mark = _SETS.get(name, _REAL)
        values = {
            site.site.removesuffix(".input"): _number(site.others[name].drift)
            for site in audit.sites
            if name in site.others
        }
        series.append(Series(f"against {NAMES.get(name, name)}", colour, values, mark))
    return draw_panels(
        _panels(names, names),
        series,
        key="ranges",
        axis="times as wide, power of two",
        says="Marks, one per layer, a panel per kind: how many times as wide the ranges are as those of other images.",
        line=("equally wide", 0.0),
    )


def _panels(names: Iterable[str], shown: Container[str]) -> list[Panel]:
    """A panel per kind of layer of which any is shown; layers that are alone in their kind share the last one."""
    kinds = [kind for kind in kinds_of(names) if any(name in shown for name in kind.members)]
    alone = [kind for kind in kinds if len(kind.members) == 1]
    panels = [Panel(kind.short, kind.members) for kind in kinds if len(kind.members) > 1]
    if alone:
        title, names = ", ".join(kind.short for kind in alone), tuple(kind.members[0] for kind in alone)
        panels.append(Panel(title, names, along=False))
    return panels


def _number(value: float | None) -> float:
    return math.nan if value is None else value
