"""What a person sees of a sweep. Nothing is computed here."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from dfq_deploy.showing.console import console

if TYPE_CHECKING:  # needs torch, which --help does not wait for
    from dfq_deploy.sweeping.results import Sweep

__all__ = ["print_sweep"]


def print_sweep(found: "Sweep", folder: Path) -> None:
    """A row per run, why those that failed did, and where it is written."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for column in ("verdict", "top-1 %", "points lost", "= float %", "SQNR dB", "MiB", "s"):
        table.add_column(column, justify="left" if column == "verdict" else "right", no_wrap=True)
    for row in found.rows():
        table.add_row(*row[:-1])
    console.print(table)
    for one in found.outcomes:
        if one.verdict != "pass":
            console.print(str(one))
        if one.error:
            console.print(f"  fix: {one.error['fix']}")
    counts = ", ".join(f"{count} {verdict}" for verdict, count in found.counts.items())
    console.print(f"{len(found.outcomes)} runs: {counts}")
    console.print(f"all figures, and the table: {folder / 'sweep'}.json, .md")
