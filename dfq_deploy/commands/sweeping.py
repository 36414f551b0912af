"""The command that makes many engines."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

import dfq_deploy as dfq
from dfq_deploy.commands import EXIT
from dfq_deploy.progress import shown_progress
from dfq_deploy.showing.sweep import print_sweep

__all__ = ["sweep"]


def sweep(
    file: Path,
    /,
    *,
    out: Path | None = None,
    images: str | None = None,
    limit: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,
    ray: str | None = None,
) -> int:
    """Export all combinations of models, schemes, generators and backends that a file names.

    Args:
        file: TOML with export's flags as fields; a list of values stands for a run with each of them.
        out: Folder of the bundles and of sweep.json and .md; as the file without .toml if left out. A sweep that was
            stopped goes on where it was.
        images: Check on these: folder:PATH, npz:PATH or an ImageSet file.
        limit: Check on this many of them, evenly spaced.
        ray: Address of a Ray cluster that carries out the runs, HOST:PORT or auto; without it they run here, one after
            the other.
    """
    with shown_progress() as watch:
        found = dfq.sweep(file, out, images=images, limit=limit, ray=ray, watch=watch)
    print_sweep(found, file.with_suffix("") if out is None else out)
    return EXIT[found.verdict]
