"""What a person sees of a sweep. Nothing is computed here."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # needs torch, which --help does not wait for
    from dfq_deploy.sweep_results import Sweep

__all__ = ["print_sweep"]

_console = Console(highlight=False, markup=False, soft_wrap=True)  # names may hold brackets: they are no markup


def print_sweep(found: "Sweep", folder: Path) -> None:
    """A row per run, why those that failed did, and where it is written."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for column in ("verdict", "top-1 %", "points lost", "= float %", "SQNR dB", "MiB", "s"):
        table.add_column(column, justify="left" if column == "verdict" else "right", no_wrap=True)
    for row in found.rows():
        table.add_row(*row[:-1])
    _console.print(table)
    for one in found.outcomes:
        if one.verdict != "pass":
            _console.print(str(one))
        if one.error:
            _console.print(f"  fix: {one.error['fix']}")
    counts = ", ".join(f"{count} {verdict}" for verdict, count in found.counts.items())
    _console.print(f"{len(found.outcomes)} runs: {counts}")
    _console.print(f"all figures, and the table: {folder / 'sweep'}.json, .md")
