"""The page: facts in, one HTML file out.

Everything that comes from a manifest or a file's name is escaped by the template engine; what is not, the charts, comes
from matplotlib, which escapes it itself. The page's own policy forbids scripts and any load, whatever slips through.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import dfq_deploy
from calibrators.errors import RecipeError
from calibrators.files import write_text
from dfq_deploy.models import Model
from dfq_deploy.reporting.checked import Interval
from dfq_deploy.reporting.comparing import compared, differences
from dfq_deploy.reporting.drawing import draw_ranges, draw_sensitivity
from dfq_deploy.reporting.facts import Missing, Options, Run, gather, timed
from dfq_deploy.reporting.layers import precision_map
from dfq_deploy.reporting.repeating import check_command, export_command, python_calls
from dfq_deploy.reporting.tables import (
    agreement_rows,
    around_zero,
    backend_of,
    calibrated_on,
    decibels,
    fingerprints,
    is_tiny,
    layer_rows,
    legend,
    place,
    plain,
    sizes_of,
    span,
    tiles_of,
    top1_rows,
)
from dfq_deploy.reporting.words import agreement_said, breakable, milliseconds, pieces, signed, size, verdict_on
from dfq_deploy.watch import SILENT, Watch
from exporters.archive import bundle_folder
from exporters.bundle import open_bundle

__all__ = ["Written", "report"]


@dataclass(frozen=True)
class Written:
    """A report that was written.

    Attributes:
        path: The file.
        missing: What it does not have.
    """

    path: Path
    missing: tuple[Missing, ...]


def report(
    folder: str | Path,
    *,
    out: str | Path | None = None,
    compare: str | Path | None = None,
    quick: bool = False,
    checkpoint: Path | None = None,
    model: Model | None = None,
    verify: str | Path | None = None,
    watch: Watch = SILENT,
) -> Written:
    """Write what is known of the bundle in `folder` as one HTML file.

    Args:
        folder: A bundle, or a zip archive of one, which stays as it is: the file must be named.
        out: The file; without it `folder/report.html`, or `folder/compare.html`.
        compare: Another bundle: the page puts the two side by side.
        quick: Measure nothing but time; what an earlier report measured is shown all the same.
        checkpoint: Where the weights lie now.
        model: The model, where `wrap` made it; without it nothing that needs it is measured.
        verify: PEM file with the public key that both must be signed with.
        watch: Told how it goes.

    Raises:
        BundleError: There is no bundle, or it is altered, or not signed with that key.
        RecipeError: `verify` cannot be read as a key, or an archive was given and no file.
    """
    folder, options = Path(folder), Options(checkpoint, quick, model)
    if out is None and folder.is_file():
        raise RecipeError(
            what=f"a report on `{folder}` has no place.",
            why="an archive stays as it is.",
            fix="name a file with --out.",
        )
    path = Path(out) if out else folder / ("report.html" if compare is None else "compare.html")
    with ExitStack() as stack:
        opened: list[tuple[Path, Path]] = []
        for given in (folder, *([] if compare is None else [Path(compare)])):
            unpacked = stack.enter_context(bundle_folder(given))
            open_bundle(unpacked, verify=verify)  # told now if it is none, not after the measurements
            opened.append((unpacked, given))
        runs = [gather(unpacked, options, watch) for unpacked, _ in opened]
        page, missing = _written(runs, opened, watch)
    write_text(path, page)
    return Written(path, missing)


def _written(runs: Sequence[Run], opened: Sequence[tuple[Path, Path]], watch: Watch) -> tuple[str, tuple[Missing, ...]]:
    """The page on one bundle or two, with their time, and what it does not have."""
    if len(runs) == 1:
        run = timed(runs[0], watch)
        run = replace(run, missing=_by_name(run.missing, opened))
        return _page("report.html.j2", _facts(run)), run.missing
    pair = compared(runs[0], runs[1], watch)
    pair = replace(pair, missing=_by_name(pair.missing, opened))
    return _page("compare.html.j2", differences(pair)), pair.missing


def _by_name(missing: Sequence[Missing], opened: Sequence[tuple[Path, Path]]) -> tuple[Missing, ...]:
    """What is missing, with what was unpacked under the name of its archive."""
    for unpacked, given in opened:
        missing = [
            replace(one, why=one.why.replace(str(unpacked), str(given)), fix=one.fix.replace(str(unpacked), str(given)))
            for one in missing
        ]
    return tuple(missing)


def _page(template: str, facts: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("dfq_deploy.reporting"),
        autoescape=True,  # every template: none but the style sheet is anything else than HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        breakable=breakable,
        calibrated_on=calibrated_on,
        decibels=decibels,
        interval=_exactly,
        legend=legend,
        milliseconds=milliseconds,
        pieces=pieces,
        place=place,
        plain=plain,
        signed=signed,
        size=size,
    )
    return environment.get_template(template).render(version=dfq_deploy.__version__, **facts)


def _facts(run: Run) -> dict[str, Any]:
    body = run.manifest.engine.options.body
    manifest, checked, precision = run.manifest, run.checked, run.manifest.engine.precision
    top1, agreement = (top1_rows(checked), agreement_rows(checked, body)) if checked else ([], [])
    reasons: dict[str, list[str]] = {}
    for layer, reason in manifest.engine.reasons.items():
        reasons.setdefault(reason, []).append(layer)
    export, check = export_command(manifest.recipe, run.name), check_command(checked, run.name) if checked else ""
    if manifest.model.wrapped:
        export, check = python_calls(manifest, checked, run.name)
    return {
        "run": run,
        "verdict": verdict_on(run),
        "backend": backend_of(manifest),
        "body": body,
        "stopped_by": [one.name for one in run.gate.checks if one.verdict == run.gate.verdict != "pass"]
        if run.gate
        else [],
        "tiles": tiles_of(run),
        "top1": top1,
        "top1_ends": span(row.share for row in top1),
        "classifier": manifest.model.task == "classification",
        "agreement": agreement,
        "agreement_said": agreement_said(manifest),
        "agreement_ends": span(row.share for row in agreement),
        "drop_ends": around_zero(checked.drop if checked else None),
        "sizes": sizes_of(run),
        "map": precision_map(precision, manifest.engine.reasons),
        "reasons": reasons,
        "roles": run.sensed.roles.values() if run.sensed else (),
        "layers": layer_rows(run),
        "sensitivity_chart": Markup(draw_sensitivity(run.sensed, precision)) if run.sensed else "",
        "ranges_chart": Markup(draw_ranges(run.audit)) if run.audit else "",
        "tiny": is_tiny(run),
        "counted": checked is not None and bool(checked.of),
        "export_command": export,
        "check_command": check if checked else "",
        "fingerprints": fingerprints(run),
    }


def _exactly(value: float) -> Interval:
    return Interval(value, value, value)
