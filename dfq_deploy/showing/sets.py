"""What a person sees of sets of images that were held against one another. Nothing is computed here."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from rich.text import Text

from dfq_deploy.showing.console import COLOURS, console

if TYPE_CHECKING:  # both need torch, which --help does not wait for
    from dfq_deploy.audited import Audit
    from dfq_deploy.generator_bench.results import GeneratorBench

__all__ = ["print_audit", "print_generators"]


def print_audit(found: "Audit", folder: Path) -> None:
    """An audit: how each other set fares, the verdict, and what was drawn."""
    title = f"{found.model}, {found.scheme}: {found.n} images, {found.images}, {len(found.sites)} sites"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("held against", overflow="fold")
    for column in ("cut off\nat most, %", "by noise's\nranges, %", "width, median\n(least to most)"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, source in found.others.items():
        drifts = [2**drift for drift in found.drifts(name)]
        by_noise = max(site.others[name].noise_excess_ppm for site in found.sites)
        table.add_row(
            f"{name}: {source}",
            f"{found.worst(name).others[name].excess_ppm / 1e4:.3f}",
            f"{by_noise / 1e4:.3f}",
            f"{np.median(drifts):.2f} ({drifts[0]:.2f} to {drifts[-1]:.2f})",
        )
    console.print(table)
    for name, why in found.absent.items():
        console.print(f"not held against {name}: {why}")
    console.print("cut off: values of that set beyond these ranges, more than these ranges leave out of their own")
    console.print("width: of these ranges over that set's own")
    console.print(Text.assemble((found.level, COLOURS[found.level]), f": {found.verdict}"))
    for line in found.left_out:
        console.print(line)
    console.print(f"written: {', '.join(str(folder / name) for name in ('audit.json', *found.pictures))}")


def print_generators(found: "GeneratorBench", folder: Path) -> None:
    """A benchmark of generators: a row per quantizer and kind of images, and why a share is missing."""
    console.print(
        f"{found.model}: float top-1 {found.float_top1:.2f} %, {found.n} images, {found.images}", style="bold"
    )
    for scheme, refine in dict.fromkeys((row.scheme, row.refine) for row in found.rows):
        table = Table(title=f"\n{scheme}, refine {refine}", title_justify="left", box=None, pad_edge=False)
        for column in ("images", "points lost", "= float, %", "SQNR, dB", "way, %", "s"):
            table.add_column(column, justify="left" if column == "images" else "right", no_wrap=True)
        for row in found.rows:
            if (row.scheme, row.refine) == (scheme, refine):
                figures = (row.shown("drop"), row.shown("agreement"))
                means = (f"{spread.mean:.1f}" if spread else "" for spread in map(row.spread, ("sqnr_db", "seconds")))
                decibels, seconds = means
                way = " / ".join(share or "-" for share in row.shares()) if any(row.shares()) else ""
                table.add_row(row.generator, *figures, decibels, way, seconds)
        console.print(table)
    console.print(f"\nmean ± standard deviation over seeds {found.settings['seeds']}; s: seconds to make the images")
    console.print(found.doubt)
    console.print("way: from noise (0) to real images (100), by agreement with float / by top-1")
    console.print(f"passes of the whole model per image, forward / backward: {found.passes()}")
    for note in found.notes():
        console.print(f"  no way told in {note}")
    console.print(f"figures, table and chart: {folder / 'generators'}.json, .md, .png")
