"""Commands that make something: images, a plan, an engine, a simulation."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

import dfq_deploy as dfq
from dfq_deploy.commands import EXIT
from dfq_deploy.progress import shown_progress
from dfq_deploy.recipe import BackendName, CalibrateRecipe, GenerateRecipe, Recipe, SimulateRecipe
from dfq_deploy.showing.bundles import print_engine, print_images, print_packed, print_plan
from dfq_deploy.showing.checks import print_check, print_simulation

__all__ = ["build", "calibrate", "export", "generate", "pack", "simulate"]


def export(
    recipe: Annotated[Recipe, Parameter(name="*")],
    *,
    out: Path,
    images: str | None = None,
    limit: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,
    sign: Path | None = None,
) -> int:
    """Make a checked engine: model, images, plan, ONNX, engine, check.

    Args:
        recipe: The run.
        out: Folder of the bundle; a run that was cut off goes on where it was.
        images: Check on these: folder:PATH, npz:PATH or an ImageSet file.
        limit: Check on this many of them, evenly spaced.
        sign: Private key (PEM) to sign the bundle with.
    """
    with shown_progress() as watch:
        found = dfq.export(recipe, out, images=images, limit=limit, sign=sign, watch=watch)
    print_check(found, out)
    return EXIT[found.verdict]


def generate(recipe: Annotated[GenerateRecipe, Parameter(name="*")], *, out: Path, ray: str | None = None) -> int:
    """Make synthetic calibration images out of the model itself.

    Args:
        recipe: The model and the method.
        out: File to write, .safetensors.
        ray: Address of a Ray cluster that makes the batches, HOST:PORT or auto; the file is the same.
    """
    with shown_progress() as watch:
        images = dfq.generate(recipe, out, ray=ray, watch=watch)
    print_images(images, out)
    return 0


def calibrate(recipe: Annotated[CalibrateRecipe, Parameter(name="*")], *, out: Path) -> int:
    """Make a plan of scales from calibration images.

    Args:
        recipe: The model, the images and the number formats.
        out: File to write, .safetensors.
    """
    with shown_progress() as watch:
        plan = dfq.calibrate(recipe, out, watch=watch)
    print_plan(plan)
    return 0


def build(
    folder: Path,
    /,
    *,
    backend: BackendName | None = None,
    sign: Path | None = None,
    verify: Path | None = None,
) -> int:
    """Build the engine of a bundle on the machine that will run it; needs no torch.

    Args:
        folder: A bundle whose engine is pending, or was made for another GPU or version.
        backend: Build for this run-time instead of the one that it was exported for.
        sign: Private key (PEM) to sign the built bundle with; without it a signature that it had goes.
        verify: Public key (PEM) that the bundle must be signed with.
    """
    manifest = dfq.build(folder, backend=backend, sign=sign, verify=verify)
    print_engine(manifest.engine, folder)
    return 0 if manifest.engine.state == "built" else EXIT["undecided"]


def pack(folder: Path, /, *, out: Path, sign: Path | None = None, verify: Path | None = None) -> int:
    """Pack a bundle into one .zip, the same bytes each time; load and the other commands take it as it is.

    Args:
        folder: A bundle.
        out: File to write, .zip.
        sign: Private key (PEM) to sign what is packed with; the folder stays as it is.
        verify: Public key (PEM) that the bundle must be signed with.
    """
    dfq.pack(folder, out, sign=sign, verify=verify)
    print_packed(out)
    return 0


def simulate(
    recipe: Annotated[SimulateRecipe, Parameter(name="*")],
    *,
    out: Path,
    images: str | None = None,
    limit: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,
) -> int:
    """Compute in PyTorch what a model is worth in number formats that no run-time has kernels for.

    Args:
        recipe: The model, the images and the number formats.
        out: Folder to write; a run that was cut off goes on where it was.
        images: Compare on these: folder:PATH, npz:PATH or an ImageSet file. Without it: the labelled images that come
            with the model, else the images that it was calibrated on.
        limit: Compare on this many of them, evenly spaced.
    """
    with shown_progress() as watch:
        found = dfq.simulate(recipe, out, images=images, limit=limit, watch=watch)
    print_simulation(found, out)
    return 0
