"""Commands that measure, `dfq-deploy bench …`."""

from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import Parameter, validators

import dfq_deploy as dfq
from dfq_deploy.bench_recipe import GeneratorsRecipe
from dfq_deploy.progress import shown_progress
from dfq_deploy.show_sets import print_generators

__all__ = ["bench"]

bench = cyclopts.App(
    name="bench",
    help="Measure: which generator's images calibrate best.",
    default_parameter=Parameter(negative_iterable=()),
)


@bench.command
def generators(
    recipe: Annotated[GeneratorsRecipe, Parameter(name="*")],
    *,
    out: Path,
    images: str | None = None,
    real: str | None = None,
    limit: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,
) -> int:
    """Compare generators of calibration images under one quantizer, simulated in PyTorch.

    Args:
        recipe: The model, the generators and the quantizers.
        out: Folder of generators.json, .md and .png; a run that was cut off goes on where it was.
        images: Labelled images to judge by: folder:PATH, npz:PATH or an ImageSet file. Without it: those that come with
            the model.
        real: Real images to calibrate on, for comparison; each seed draws --count of them, and none may be among
            --images.
        limit: Judge by this many of the images, evenly spaced.
    """
    with shown_progress() as watch:
        found = dfq.bench_generators(recipe, out, images=images, real=real, limit=limit, watch=watch)
    print_generators(found, out)
    return 0
