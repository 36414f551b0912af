"""Two bundles side by side: what differs in their figures, their layers and how they were made."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from calibrators.errors import BundleError, DeployError
from dfq_deploy.reporting.checked import Interval
from dfq_deploy.reporting.facts import Missing, Run, missing_for
from dfq_deploy.reporting.layers import in_network_order, precision_map
from dfq_deploy.reporting.measuring import FLOAT, Latency, measure_latency
from dfq_deploy.reporting.repeating import export_command, neutral, python_calls
from dfq_deploy.reporting.tables import NOTHING, backend_of, is_tiny, span
from dfq_deploy.reporting.words import signed, size, verdict_on
from dfq_deploy.watch import Watch

__all__ = ["Pair", "compared", "differences"]

A, B = "A", "B"


@dataclass(frozen=True)
class Pair:
    """Two bundles.

    Attributes:
        runs: `A` and `B`.
        latency: The time that both take, measured in turn.
        missing: What either lacks.
    """

    runs: Mapping[str, Run]
    latency: tuple[Latency, ...]
    missing: tuple[Missing, ...]


@dataclass(frozen=True)
class Row:
    """A figure of both.

    Attributes:
        name: What it is.
        shown: The figure of `A` and `B`, as text.
        shares: The same with intervals, where it is a percentage.
        changed: Whether they differ.
    """

    name: str
    shown: tuple[str, str]
    shares: tuple[Interval, Interval] | None = None
    changed: bool = False


def compared(first: Run, second: Run, watch: Watch) -> Pair:
    """`first` and `second`, timed in turn where they are of one shape of images.

    Raises:
        BundleError: They take different images, so that nothing of them can be compared.
    """
    runs = {A: first, B: second}
    shapes = [run.manifest.preprocess.shape for run in runs.values()]
    if shapes[0] != shapes[1]:
        raise BundleError(
            what=f"`{first.folder}` and `{second.folder}` cannot be compared.",
            why=f"one takes images of {shapes[0]}, the other of {shapes[1]}.",
            fix="compare two bundles of one model.",
        )
    missing = [replace(one, section=f"{name}: {one.section}") for name, run in runs.items() for one in run.missing]
    latency: tuple[Latency, ...] = ()
    try:
        latency = tuple(measure_latency({name: run.folder for name, run in runs.items()}, first.manifest, watch))
    except DeployError as error:
        missing.append(missing_for("Time", error))
    return Pair(runs, latency, tuple(missing))


def differences(pair: Pair) -> dict[str, Any]:
    """What the page shows."""
    first, second = pair.runs.values()
    found = [run.manifest.engine.precision for run in (first, second)]
    names = in_network_order(*found)
    precisions = [{layer: own[layer] for layer in names if layer in own} for own in found]
    maps = {
        name: precision_map(own, run.manifest.engine.reasons, other)
        for (name, run), own, other in zip(pair.runs.items(), precisions, reversed(precisions), strict=True)
    }
    pairs = [(layer, *(own.get(layer, NOTHING) for own in precisions)) for layer in names]
    shares = _shares(first, second)
    return {
        "runs": pair.runs,
        "latency": pair.latency,
        "missing": pair.missing,
        "tiny": is_tiny(first),
        "verdicts": {name: verdict_on(run) for name, run in pair.runs.items()},
        "backends": {name: backend_of(run.manifest) for name, run in pair.runs.items()},
        "warnings": _warnings(first, second),
        "shares": shares,
        "ends": span([one for row in shares for one in row.shares or ()]),
        "figures": _figures(first, second),
        "maps": maps,
        "changed_layers": [one for one in pairs if one[1] != one[2]],
        "layer_count": len(pairs),
        "made": _made(first, second),
        "commands": {name: _command(run) for name, run in pair.runs.items()},
        "names": {FLOAT: ("float", "float"), A: (f"A: {first.name}", "engine"), B: (f"B: {second.name}", "other")},
    }


def _command(run: Run) -> str:
    manifest = run.manifest
    if manifest.model.wrapped:
        return python_calls(manifest, run.checked, run.name)[0]
    return export_command(manifest.recipe, run.name)


def _warnings(first: Run, second: Run) -> list[str]:
    found = []
    if first.manifest.model.fingerprint != second.manifest.model.fingerprint:
        found.append("The two were made from different weights: whatever differs may come from them.")
    if first.checked and second.checked:
        images = [run.checked.of.get("images") or run.checked.images for run in (first, second) if run.checked]
        if images[0] != images[1] or first.checked.n != second.checked.n:
            found.append("The two were checked on different images: their accuracies do not compare.")
    return found


def _shares(first: Run, second: Run) -> list[Row]:
    """Percentages that both have; changed where the intervals do not overlap."""
    named = {
        "top1_float": "Top-1, float",
        "top1_reference": "Top-1, reference",
        "top1_engine": "Top-1, engine",
        "engine_float": "Agreement, engine and float",
        "engine_reference": "Agreement, engine and reference",
        "noise_floor": "Agreement, reference and itself, moved",
    }
    rows = []
    for key, name in named.items():
        both = [run.checked.share(key) if run.checked else None for run in (first, second)]
        if both[0] is not None and both[1] is not None:
            apart = both[0].low > both[1].high or both[1].low > both[0].high
            shown = tuple(f"{one.value:.2f}" for one in both if one)
            rows.append(Row(name, (shown[0], shown[1]), (both[0], both[1]), apart))
    return rows


def _figures(first: Run, second: Run) -> list[Row]:
    def row(name: str, *values: str) -> Row:
        return Row(name, (values[0], values[1]), changed=values[0] != values[1])

    def noise(run: Run) -> str:
        value = run.checked.sqnr_db.get("engine_float") if run.checked else None
        return NOTHING if value is None else f"{value:.1f} dB"

    def drop(run: Run) -> str:
        lost = run.checked.drop if run.checked else None
        return NOTHING if lost is None else f"{signed(lost.value)} ({signed(lost.low)} to {signed(lost.high)})"

    def layers(run: Run) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in run.manifest.engine.census.counts.items()) or NOTHING

    runs = (first, second)
    return [
        row("Drop against float, points", *map(drop, runs)),
        row("SQNR to float", *map(noise, runs)),
        row("Size of the engine", *(size(run.engine_bytes) for run in runs)),
        row("Layers", *map(layers, runs)),
        row("All quantized, on the reference", *(_whole(run) for run in runs)),
        row("Audit of the images", *(run.audit.level if run.audit else NOTHING for run in runs)),
    ]


def _whole(run: Run) -> str:
    value = run.sensed.whole.sqnr_db if run.sensed else None
    return NOTHING if value is None else f"{value:.1f} dB"


def _made(first: Run, second: Run) -> list[tuple[str, str, str]]:
    """Fields of the recipe and versions that differ."""
    facts: list[dict[str, Any]] = []
    for run in (first, second):
        recipe = run.manifest.recipe
        places = {name: neutral(str(value)) for name, value in recipe.items() if name in ("checkpoint", "calib")}
        facts.append({**recipe, **places, **run.manifest.versions})
    own, others = facts
    both = [(name, str(own.get(name, NOTHING)), str(others.get(name, NOTHING))) for name in {**own, **others}]
    return [one for one in both if one[1] != one[2]]
