"""The command that a pipeline stops at."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

import dfq_deploy as dfq
from calibrators.files import writable
from dfq_deploy.commands import EXIT
from dfq_deploy.gating.limits import GateLimits
from dfq_deploy.progress import shown_progress
from dfq_deploy.showing.gate import print_gate

__all__ = ["gate"]

_DEFAULT = GateLimits()
_File = Annotated[Path | None, Parameter(validator=validators.Path(dir_okay=False))]


def gate(
    folder: Path,
    /,
    limits: Annotated[GateLimits, Parameter(name="*")] = _DEFAULT,
    *,
    images: str | None = None,
    limit: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,
    baseline: _File = None,
    update: Annotated[bool, Parameter(negative=())] = False,
    checkpoint: Path | None = None,
    verify: Path | None = None,
    json: _File = None,
    junit: _File = None,
    markdown: _File = None,
) -> int:
    """Judge a bundle for a pipeline: 0 pass, 1 fail, 2 undecided, 3 a wrong call.

    Args:
        folder: A bundle, or a .zip of one.
        limits: What is let pass.
        images: folder:PATH, npz:PATH or an ImageSet file; with labels, accuracy is judged. Without it: the images that
            the bundle was calibrated on.
        limit: Use this many of them, evenly spaced.
        baseline: A file that an earlier gate wrote; the engine is compared with it, image by image.
        update: Write that file from this engine instead, and say what changes; a failing engine is not written.
        checkpoint: Where the weights lie now.
        verify: Public key (PEM) that the bundle must be signed with; the gate fails if it is not.
        json: File for the verdict and its checks as JSON.
        junit: File for the checks as JUnit XML.
        markdown: File for the checks as a Markdown table.
    """
    for flag, place in (("--json", json), ("--junit", junit), ("--markdown", markdown)):
        if place is not None:
            writable(place, flag)  # told now if it is not, rather than with the verdict
    with shown_progress() as watch:
        found = dfq.gate(
            folder,
            limits,
            images=images,
            limit=limit,
            baseline=baseline,
            update=update,
            checkpoint=checkpoint,
            verify=verify,
            watch=watch,
        )
    try:
        for path, save in ((json, found.save), (junit, found.save_junit), (markdown, found.save_markdown)):
            if path is not None:
                save(path)
    finally:
        print_gate(found)
    return EXIT[found.verdict]
