"""What the pages put into tables, tiles and tracks: rows, and where on a line a value stands. All is known already."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dfq_deploy.reporting.checked import Checked, Interval
from dfq_deploy.reporting.facts import Run
from dfq_deploy.reporting.layers import Cell, Kind
from dfq_deploy.reporting.measuring import FLOAT
from dfq_deploy.reporting.words import milliseconds, size
from exporters.bundle import Manifest

__all__ = [
    "NOTHING",
    "LayerRow",
    "Share",
    "Size",
    "Tile",
    "agreement_rows",
    "around_zero",
    "backend_of",
    "calibrated_on",
    "decibels",
    "fingerprints",
    "is_tiny",
    "layer_rows",
    "legend",
    "place",
    "plain",
    "sizes_of",
    "span",
    "tiles_of",
    "top1_rows",
]

NOTHING = "\N{EN DASH}"
"""Stands where a figure is not known."""
_TINY = 64  # pixels of a side
_BACKENDS = {"ort": "ONNX Runtime", "trt": "TensorRT", "rtx": "TensorRT for RTX"}


@dataclass(frozen=True)
class Share:
    """A percentage in a table.

    Attributes:
        name: Whose.
        colour: The page's name of its colour.
        share: The percentage.
    """

    name: str
    colour: str
    share: Interval


@dataclass(frozen=True)
class Tile:
    """A figure that is seen first."""

    name: str
    figure: str
    note: str


@dataclass(frozen=True)
class Size:
    """How large something is."""

    name: str
    colour: str
    bytes: int


@dataclass(frozen=True)
class LayerRow:
    """A layer with its figures, as text."""

    name: str
    precision: str
    figures: tuple[str, ...]


def top1_rows(checked: Checked) -> list[Share]:
    """Accuracy of float, reference and engine; none without labels."""
    return _rows(checked, {f"top1_{who}": (who, who) for who in ("float", "reference", "engine")})


def agreement_rows(checked: Checked, body: str) -> list[Share]:
    """Who decides like whom, where all that is not quantized is computed in `body`."""
    moved = "moved by 1e-6" if body == "fp32" else f"rounded to {body}"
    named = {
        "engine_float": ("engine and float", "engine"),
        "engine_reference": ("engine and reference", "engine"),
        "noise_floor": (f"reference and itself, {moved}", "reference"),
    }
    return _rows(checked, named)


def _rows(checked: Checked, named: Mapping[str, tuple[str, str]]) -> list[Share]:
    shares = {key: checked.share(key) for key in named}
    return [Share(*named[key], share) for key, share in shares.items() if share is not None]


def span(shares: Iterable[Interval]) -> tuple[float, float]:
    """The ends of a line that holds all intervals: up to 100 %, from a round number on."""
    low = min((share.low for share in shares), default=0.0)
    step = 1 if low > 95 else 5 if low > 70 else 10
    return float(max(0, math.floor(low / step - 0.2) * step)), 100.0


def around_zero(value: Interval | None) -> tuple[float, float]:
    """The ends of a line that holds an interval and as much on the other side of zero."""
    reach = float(math.ceil(1.15 * max(abs(value.low), abs(value.high), 0.5))) if value else 1.0
    return -reach, reach


def place(value: float, ends: tuple[float, float]) -> float:
    """Where `value` stands on a line with these ends, in percent of its length."""
    start, end = ends
    share = (value - start) / (end - start) if end > start else 0.0
    return round(100 * min(1.0, max(0.0, share)), 2)


def tiles_of(run: Run) -> list[Tile]:
    """The figures that are seen first."""
    tiles = []
    if checked := run.checked:
        if (engine := checked.share("top1_engine")) and (plain_float := checked.share("top1_float")):
            tiles.append(Tile("Top-1", f"{engine.value:.1f} %", f"float {plain_float.value:.1f} %"))
        if share := checked.share("engine_float"):
            tiles.append(Tile("Same as float", f"{share.value:.1f} %", f"{share.low:.1f} {NOTHING} {share.high:.1f} %"))
    if run.latency and (ratio := run.latency[0].ratios.get("engine")):
        took, floats = (run.latency[0].milliseconds[name].value for name in ("engine", FLOAT))
        faster = f"{ratio.value:.2f}\N{MULTIPLICATION SIGN}"
        tiles.append(Tile("Speed, one image", faster, f"{milliseconds(took)} ms, float {milliseconds(floats)} ms"))
    elif run.latency:
        tiles.append(Tile("One image", f"{milliseconds(run.latency[0].milliseconds['engine'].value)} ms", "a call"))
    of_float = f"{run.engine_bytes / run.float_bytes:.0%} of float's {size(run.float_bytes)}" if run.float_bytes else ""
    tiles.append(
        Tile("Size" if run.manifest.engine.state == "built" else "Size of model.onnx", size(run.engine_bytes), of_float)
    )
    if counts := run.manifest.engine.census.counts:
        precision, count = next(iter(counts.items()))
        tiles.append(Tile("Layers", f"{count} {precision}", f"of {sum(counts.values())} that could be"))
    return tiles


def sizes_of(run: Run) -> list[Size]:
    """What is deployed, and float where it was kept."""
    sizes = [Size("float", "float", run.float_bytes)] if run.float_bytes else []
    return [*sizes, Size(_deployed(run), "engine", run.engine_bytes)]


def _deployed(run: Run) -> str:
    """What is there to deploy."""
    return "engine" if run.manifest.engine.state == "built" else "model.onnx"


def backend_of(manifest: Manifest) -> str:
    """The run-time, for people."""
    options = manifest.engine.options
    on = f" on {options.provider}" if manifest.backend == "ort" and options.provider else ""
    targets = f" for {', '.join(options.targets)}" if options.targets else ""
    body = "" if options.body == "fp32" else f", the rest in {options.body}"
    return f"{_BACKENDS.get(manifest.backend, manifest.backend)}{on}{targets}{body}"


def calibrated_on(manifest: Manifest) -> str:
    """Where the calibration images come from."""
    return manifest.images.get("source", "images of unknown source")


def fingerprints(run: Run) -> list[tuple[str, str]]:
    """What tells models and images apart, by name."""
    found = [("weights", run.manifest.model.fingerprint)]
    found.append(("calibration images", run.manifest.images.get("fingerprint", NOTHING)))
    if run.checked and run.checked.of.get("images"):
        found.append(("checked images", run.checked.of["images"]))
    return found


def is_tiny(run: Run) -> bool:
    """Whether its images are shown enlarged."""
    return max(run.manifest.preprocess.size) <= _TINY


def layer_rows(run: Run) -> list[LayerRow]:
    """Every layer with what is known of it."""
    errors = run.checked.layer_error if run.checked else {}
    roles = run.sensed.roles if run.sensed else {}
    costs = {layer.name: layer for layer in run.sensed.layers} if run.sensed else {}
    spared = {layer.name: layer for layer in run.sensed.spared} if run.sensed else {}
    rows = []
    for name, precision in run.manifest.engine.precision.items():
        error = errors.get(name)
        figures = [f"{error:.1e}" if error is not None else NOTHING]
        if cost := costs.get(name):
            sites = {site.rpartition(".")[2]: effect.sqnr_db for site, effect in cost.sites.items()}
            figures += [decibels(cost.alone.sqnr_db), *(decibels(sites.get(role)) for role in roles)]
            figures += [f"{cost.noise_percent:.1f}", f"{cost.macs_percent:.1f}"]
        elif left := spared.get(name):
            alone = decibels(left.alone.sqnr_db if left.alone else None)
            figures += [alone, *[NOTHING] * len(roles), NOTHING, f"{left.macs_percent:.1f}"]
        else:
            figures += [NOTHING] * (3 + len(roles))
        rows.append(LayerRow(name, precision, tuple(figures)))
    return rows


def legend(rows: Iterable[tuple[Kind, Iterable[Cell]]]) -> dict[str, tuple[str, int]]:
    """What each precision is written as on a map, and how many layers have it."""
    cells = [cell for _, held in rows for cell in held]
    counts = Counter(cell.precision for cell in cells)
    return {cell.precision: (cell.text, counts[cell.precision]) for cell in cells}


def decibels(value: float | None) -> str:
    """A ratio in dB, as text."""
    return NOTHING if value is None else f"{value:.1f}"


def plain(value: Any) -> str:
    """Something out of another tool's JSON, as text."""
    if value is None:
        return NOTHING
    if isinstance(value, list):
        return f" {NOTHING} ".join(plain(one) for one in value)
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return str(value)
