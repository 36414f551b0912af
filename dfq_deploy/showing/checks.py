"""What a person sees of a check, a simulation and a report."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from dfq_deploy.showing.bundles import print_engine
from dfq_deploy.showing.console import COLOURS, STUDENT, console, decibels
from dfq_deploy.tasks import task_named

if TYPE_CHECKING:
    from dfq_deploy.evaluate import Check
    from dfq_deploy.reporting.page import Written
    from dfq_deploy.simulation import Simulation

__all__ = ["print_check", "print_report", "print_simulation"]


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
    console.print(table)
    print_engine(found.engine, folder)
    if found.student:
        console.print(STUDENT)
    if found.drop is not None:
        console.print("{} loses {:.2f} points against float ({:.2f} to {:.2f})".format(found.ran, *found.drop))
    if found.task != "classification":
        console.print("no labels are read: this shows whether the engine computes its plan, not how accurate it is")
    elif found.top1 is None:
        console.print("no labels: this shows whether the engine computes its plan, not how accurate it is (--images)")
    peaks = ", ".join(f"{name} {cost.peak_mib:.0f}" for name, cost in found.stages.items() if cost.peak_mib)
    if peaks:
        console.print(f"peak memory, MiB: {peaks}")
    console.print(Text.assemble((found.verdict, COLOURS[found.verdict]), f": {found.reason}"))
    if folder.is_dir():
        console.print(f"report: {folder / 'report.json'}")


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
    console.print(table)
    console.print(
        f"SQNR of the {'logits' if found.task == 'classification' else 'outputs'}: {decibels(found.sqnr_db)} dB"
    )
    if found.student:
        console.print(STUDENT)
    if found.drop is not None:
        console.print("simulated loses {:.2f} points against float ({:.2f} to {:.2f})".format(*found.drop))
    console.print(f"report: {folder / 'report.json'}")


def _measured_in(task: str) -> str:
    return "top-1" if task == "classification" else task_named(task).AGREEMENT


def print_report(found: "Written") -> None:
    """A report that was written, and what it does not have."""
    for one in found.missing:
        console.print(f"left out, {one.section}: {one.why}")
    console.print(f"report: {found.path}")
