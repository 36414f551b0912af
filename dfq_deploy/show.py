"""What a person sees of a result: tables on the terminal. Nothing is computed here."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from calibrators.errors import RecipeError
from calibrators.files import is_plain_file, sha256_of
from calibrators.images import ImageSet, is_image_set
from calibrators.pictures import sheet_beside
from calibrators.plan import QuantPlan
from dfq_deploy.tasks import task_named
from exporters.archive import bundle_folder, is_archive
from exporters.bundle import EngineFacts, open_bundle
from exporters.signing import SIGNATURE

if TYPE_CHECKING:  # doctor.py asks for CUDA, the others need torch: --help and a run of an engine wait for neither
    from dfq_deploy.analysis import Sensitivity
    from dfq_deploy.doctor import Finding
    from dfq_deploy.evaluate import Check
    from dfq_deploy.reporting.page import Written
    from dfq_deploy.simulation import Simulation
    from dfq_deploy.sparing import Massive

__all__ = [
    "print_check",
    "print_converted",
    "print_engine",
    "print_findings",
    "print_images",
    "print_packed",
    "print_path",
    "print_plan",
    "print_report",
    "print_sensitivity",
    "print_simulation",
]

_console = Console(highlight=False, markup=False, soft_wrap=True)  # names may hold brackets: they are no markup
_ROWS = 20  # of layers that hurt; what they leave out is counted below them
_STUDENT = "the weights are those of a student that came with the images; float has the model's own"
_FEW = 3  # spared layers named per reason
_COLOURS = {
    "pass": "green",
    "fail": "red",
    "undecided": "yellow",
    "ok": "green",
    "absent": "dim",
    "problem": "red",
}


def print_check(found: "Check", folder: Path) -> None:
    """A check: what agrees with what, and the verdict."""
    table = Table(title=f"{found.n} images, {found.images}", title_justify="left", box=None, pad_edge=False)
    for column in ("", f"{_measured_in(found.task)} %", "95 % interval"):
        table.add_column(column, justify="left" if not column else "right")
    body = found.engine.options.body
    moved = "moved by 1e-6" if body == "fp32" else f"rounded to {body}"
    rows = {
        f"{found.ran} agrees with the reference": found.agreement["engine_reference"],
        f"reference with itself, {moved}": found.agreement["noise_floor"],
        f"{found.ran} agrees with float": found.agreement["engine_float"],
    }
    names = {"engine": found.ran}
    rows.update({f"{names.get(name, name)}, against labels": share for name, share in (found.top1 or {}).items()})
    for name, share in rows.items():
        table.add_row(name, f"{share.percent:.2f}", f"{share.low:.1f} to {share.high:.1f}")
    _console.print(table)
    print_engine(found.engine, folder)
    if found.student:
        _console.print(_STUDENT)
    if found.drop is not None:
        _console.print("{} loses {:.2f} points against float ({:.2f} to {:.2f})".format(found.ran, *found.drop))
    if found.task != "classification":
        _console.print("no labels are read: this shows whether the engine computes its plan, not how accurate it is")
    elif found.top1 is None:
        _console.print("no labels: this shows whether the engine computes its plan, not how accurate it is (--images)")
    peaks = ", ".join(f"{name} {cost.peak_mib:.0f}" for name, cost in found.stages.items() if cost.peak_mib)
    if peaks:
        _console.print(f"peak memory, MiB: {peaks}")
    _console.print(Text.assemble((found.verdict, _COLOURS[found.verdict]), f": {found.reason}"))
    if folder.is_dir():
        _console.print(f"report: {folder / 'report.json'}")


def print_simulation(found: "Simulation", folder: Path) -> None:
    """A simulation: how accurate the number formats are."""
    title = f"{found.scheme}, simulated in PyTorch: {found.n} images, {found.images}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("", f"{_measured_in(found.task)} %", "95 % interval"):
        table.add_column(column, justify="left" if not column else "right")
    rows = {"simulated agrees with float": found.agreement}
    rows.update({f"{name}, against labels": share for name, share in (found.top1 or {}).items()})
    for name, share in rows.items():
        table.add_row(name, f"{share.percent:.2f}", f"{share.low:.1f} to {share.high:.1f}")
    _console.print(table)
    _console.print(
        f"SQNR of the {'logits' if found.task == 'classification' else 'outputs'}: {_decibels(found.sqnr_db)} dB"
    )
    if found.student:
        _console.print(_STUDENT)
    if found.drop is not None:
        _console.print("simulated loses {:.2f} points against float ({:.2f} to {:.2f})".format(*found.drop))
    _console.print(f"report: {folder / 'report.json'}")


def _measured_in(task: str) -> str:
    return "top-1" if task == "classification" else task_named(task).AGREEMENT


def print_engine(facts: EngineFacts, folder: Path) -> None:
    """The engine: how far it is, how many layers are computed in what, and why some stay float."""
    targets = f" for {', '.join(facts.options.targets)}" if facts.options.targets else ""
    _console.print(f"engine: {facts.state}{targets}{f' ({facts.note})' if facts.note else ''}")
    if facts.state == "pending":
        _console.print(f"  build it on the machine that will run it: dfq-deploy build {folder}")
    layers = facts.census.counts
    if layers:
        _console.print(f"layers: {', '.join(f'{count} in {kind}' for kind, count in layers.items())}")
    for reason in dict.fromkeys(facts.reasons.values()):
        named = [layer for layer, why in facts.reasons.items() if why == reason]
        _console.print(f"  {named[0] if len(named) == 1 else f'{len(named)} like {named[0]}'}: {reason}")
    if facts.kernels:
        _console.print(f"kernels: {', '.join(f'{count} {kind}' for kind, count in facts.kernels.items())}")


def print_report(found: "Written") -> None:
    """A report that was written, and what it does not have."""
    for one in found.missing:
        _console.print(f"left out, {one.section}: {one.why}")
    _console.print(f"report: {found.path}")


def print_sensitivity(found: "Sensitivity") -> None:
    """A sensitivity analysis: the layers that hurt most, those that stay float, and massive activations."""
    table = Table(title=f"{found.n} images, {found.images}", title_justify="left", box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for column in ("alone\ndB", "its sites\ndB", "= float\n%", "noise\n%", "spared\ndB", "MACs\n%"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in found.layers[:_ROWS]:
        table.add_row(
            layer.name,
            _decibels(layer.alone.sqnr_db),
            " / ".join(_decibels(effect.sqnr_db) for effect in layer.sites.values()),
            f"{layer.alone.agreement.percent:.1f}",
            f"{layer.noise_percent:.1f}",
            f"{layer.gain_db:+.2f}",
            f"{layer.macs_percent:.1f}",
        )
    _console.print(table)
    kinds = dict.fromkeys(" / ".join(site.rpartition(".")[2] for site in layer.sites) for layer in found.layers)
    if rest := found.layers[_ROWS:]:
        _console.print(f"{len(rest)} more layers make {sum(layer.noise_percent for layer in rest):.1f} % of the noise")
    _console.print("alone, = float: SQNR and top-1 agreement when it is all that is quantized; spared: SQNR gained")
    _console.print(f"its sites: {', '.join(kinds)}, each alone; MACs: share of the model's multiply-accumulates")
    whole, share = found.whole, found.whole.agreement
    _console.print(
        f"all {len(found.layers)} layers: {_decibels(whole.sqnr_db)} dB, {share.percent:.1f} % as float "
        f"({share.low:.1f} to {share.high:.1f}); each alone and added up: {_decibels(found.summed_db)} dB"
    )
    _print_spared(found)
    _print_massive(found)


def _print_spared(found: "Sensitivity") -> None:
    """The layers that stay float, by reason, with what quantizing them would cost; the worst are named."""
    for reason in dict.fromkeys(layer.reason for layer in found.spared):
        layers = [layer for layer in found.spared if layer.reason == reason]
        _console.print(f"stays float: {reason}")
        costs = sorted((layer.alone.sqnr_db, layer.macs_percent, layer.name) for layer in layers if layer.alone)
        for sqnr_db, macs, name in costs[:_FEW]:
            _console.print(f"  {name} ({macs:.1f} % of MACs): alone it would give {_decibels(sqnr_db)} dB")
        if costs[_FEW:]:
            _console.print(f"  {len(costs) - _FEW} more: {_decibels(costs[_FEW][0])} to {_decibels(costs[-1][0])} dB")
        if unknown := [layer.name for layer in layers if layer.alone is None]:
            _console.print(f"  {_counted(unknown)}: not measured: no ranges for it in work/, or no format fits")


def _print_massive(found: "Sensitivity") -> None:
    """Where massive activations are; places with the same channels in one line."""
    groups: dict[tuple[bool, tuple[int, ...]], list[Massive]] = {}
    for massive in found.massive:
        groups.setdefault((massive.stream, tuple(massive.channels)), []).append(massive)
    _console.print("massive activations, found on noise:" if groups else "massive activations: none, on noise")
    for (stream, _), places in groups.items():
        names = _counted([massive.place for massive in places])
        worst = max(places, key=lambda massive: massive.largest)
        _console.print(
            f"  {f'residual stream at {names}' if stream else names}: {'it' if stream else 'its input'} {worst}"
        )


def _counted(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _decibels(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "no noise" if value > 0 else "NaN"


def print_images(images: ImageSet, path: Path) -> None:
    """An ImageSet: how many, of what size, made how."""
    _console.print(f"{path}: {len(images)} images {images.preprocess.shape}, {images.source}")
    for name, value in images.made_by.items():
        _console.print(f"  {name}: {value}")
    if images.student is not None:
        _console.print(f"  student: {len(images.student.weights)} tensors, learned for {images.student.scheme}")
    if sheet_beside(path).is_file():
        _console.print(f"  contact sheet: {sheet_beside(path)}")


def print_plan(plan: QuantPlan) -> None:
    """A plan: each quantized site with its format and scale, and each spared one with its reason."""
    table = Table(title=f"{plan.scheme}: {len(plan.sites)} sites", title_justify="left", box=None, pad_edge=False)
    for column in ("site", "codes", "scale", "zero-point"):
        table.add_column(column)
    for name, q in plan.sites.items():
        per = (
            f"{q.scale.min():.4g} to {q.scale.max():.4g}, {q.scale.size} scales"
            if q.scale.size > 1
            else f"{q.scale:.4g}"
        )
        table.add_row(name, q.codes.name, per, "0" if not q.zero_point.any() else str(q.zero_point))
    _console.print(table)
    for reason in dict.fromkeys(plan.spared.values()):
        sites = [name for name, why in plan.spared.items() if why == reason]
        spared = "stay float" if sites[0] not in plan.sites else "differ"
        _console.print(f"{len(sites)} sites {spared}: {reason}.")


def print_packed(path: Path) -> None:
    """The archive that a bundle was packed into."""
    _console.print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, SHA-256 {sha256_of(path)}")


def print_path(path: Path, verify: Path | None = None) -> None:
    """Whatever lies at `path`: a bundle, a plan or an ImageSet.

    Raises:
        BundleError: It is a bundle that is not whole, or not signed with the key `verify`.
        RecipeError: It is none, and cannot be signed.
    """
    if path.is_dir() or is_archive(path):
        _print_bundle(path, verify)
    elif verify is not None:
        raise RecipeError(
            what=f"--verify means nothing to `{path}`.",
            why="bundles are signed, plans and images are not.",
            fix="leave it out, or pass a bundle.",
        )
    elif is_image_set(path):
        print_images(ImageSet.load(path), path)
    else:
        print_plan(QuantPlan.load(path))


def _print_bundle(path: Path, verify: Path | None) -> None:
    with bundle_folder(path) as folder:
        manifest = open_bundle(folder, verify=verify)
        _console.print(f"{path}: {manifest.model.name}, {manifest.scheme}, for {manifest.backend}", style="bold")
        print_engine(manifest.engine, path)
        _console.print(f"  calibrated on: {manifest.images['source']}")
        if manifest.model.student:
            _console.print(f"  {_STUDENT}")
        _console.print(f"  float ONNX against torch: {manifest.float_parity:.1e}")
        for name in manifest.files:
            _console.print(f"  {name}: {(folder / name).stat().st_size / 2**20:.1f} MiB")
        if verify is not None:
            _console.print(f"  signed with the key of {verify}")
        elif is_plain_file(folder / SIGNATURE):
            _console.print("  signed; not verified, which takes --verify")
        if (path / "recipe.toml").is_file():
            _console.print("  repeat: dfq-deploy export --recipe", path / "recipe.toml", "--out DIR")


def print_converted(file: Path, out: Path, to: str) -> None:
    """What was written from what."""
    _console.print(f"{out}: {file} as {to}")


def print_findings(findings: "list[Finding]") -> int:
    """What the doctor found; returns 1 if there is a problem."""
    for finding in findings:
        state = (f"{finding.state:>8}", _COLOURS[finding.state])
        _console.print(Text.assemble(state, f"  {finding.subject}: {finding.text}"))
    return int(any(finding.state == "problem" for finding in findings))
