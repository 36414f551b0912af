"""Commands that judge what was made: its images, its engine, its layers."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

import dfq_deploy as dfq
from calibrators.files import writable
from dfq_deploy.commands import EXIT
from dfq_deploy.progress import shown_progress
from dfq_deploy.recipe import AuditRecipe
from dfq_deploy.showing.checks import print_check
from dfq_deploy.showing.sensitivity import print_sensitivity
from dfq_deploy.showing.sets import print_audit

__all__ = ["audit", "check", "sensitivity"]

_AUDIT_OF_A_BUNDLE = AuditRecipe()


def audit(
    images: str,
    /,
    recipe: Annotated[AuditRecipe, Parameter(name="*")] = _AUDIT_OF_A_BUNDLE,
    *,
    out: Path,
    verify: Path | None = None,
) -> int:
    """Compare the ranges that calibration images give with those of noise, another seed and real images.

    Args:
        images: folder:PATH, npz:PATH, an ImageSet file, or a bundle (or a .zip of one): the images that it was
            calibrated on.
        recipe: The model and what to compare with.
        out: Folder to write: audit.json and pictures.
        verify: Public key (PEM) that the bundle must be signed with.
    """
    with shown_progress() as watch:
        found = dfq.audit(images, recipe, out, verify=verify, watch=watch)
    print_audit(found, out)
    return EXIT[found.level]


def check(
    folder: Path,
    /,
    *,
    images: str | None = None,
    limit: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,
    checkpoint: Path | None = None,
    verify: Path | None = None,
    ray: str | None = None,
) -> int:
    """Compare an engine with its PyTorch reference and with the float model.

    Args:
        folder: A bundle, or a .zip of one, which gets no report.json.
        images: folder:PATH, npz:PATH or an ImageSet file. Without it: the labelled images that come with the model,
            else the images that it was calibrated on.
        limit: Use this many of them, evenly spaced.
        checkpoint: Where the weights lie now.
        verify: Public key (PEM) that the bundle must be signed with.
        ray: Address of a Ray cluster that looks at shards of the images, HOST:PORT or auto; the numbers are the same.
    """
    with shown_progress() as watch:
        found = dfq.check(
            folder, images=images, limit=limit, checkpoint=checkpoint, verify=verify, ray=ray, watch=watch
        )
    print_check(found, folder)
    return EXIT[found.verdict]


def sensitivity(
    folder: Path,
    /,
    *,
    images: str | None = None,
    limit: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 16,
    checkpoint: Path | None = None,
    json: Annotated[Path | None, Parameter(validator=validators.Path(dir_okay=False))] = None,
    plot: Annotated[Path | None, Parameter(validator=validators.Path(ext=("pdf", "png", "svg")))] = None,
    verify: Path | None = None,
) -> int:
    """Show which layers of a bundle quantization hurts most, and what sparing each would gain.

    Args:
        folder: A bundle, or a .zip of one; its engine is not run.
        images: folder:PATH, npz:PATH or an ImageSet file; labels are not needed. Without it: the images that it was
            calibrated on, or noise where those are gone.
        limit: Use this many of them, evenly spaced.
        checkpoint: Where the weights lie now.
        json: File for all the numbers.
        plot: File for a bar chart, .png, .svg or .pdf.
        verify: Public key (PEM) that the bundle must be signed with.
    """
    draw = None if plot is None else dfq.plot_sensitivity  # told now if matplotlib is missing, not at the end
    for flag, path in (("--json", json), ("--plot", plot)):
        if path is not None:
            writable(path, flag)
    with shown_progress() as watch:
        found = dfq.sensitivity(folder, images=images, limit=limit, checkpoint=checkpoint, verify=verify, watch=watch)
    print_sensitivity(found)
    if json is not None:
        found.save(json)
    if plot is not None and draw is not None:
        draw(found, plot)
    return 0
