"""Commands that measure, `dfq-deploy bench …`."""

from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import Parameter, validators

import dfq_deploy as dfq
from calibrators.files import writable, write_json
from dfq_deploy.generator_bench.recipe import GeneratorsRecipe
from dfq_deploy.progress import shown_progress
from dfq_deploy.recipe import ProviderName
from dfq_deploy.showing.engine import print_engine_bench
from dfq_deploy.showing.sets import print_generators

__all__ = ["bench"]

bench = cyclopts.App(
    name="bench",
    help="Measure: how fast an engine is, and which generator's images calibrate best.",
    default_parameter=Parameter(negative_iterable=()),
)


@bench.default
def engine(
    folder: Path,
    /,
    *,
    vs: Path | None = None,
    batch: str = "1,8",
    calls: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,
    seconds: Annotated[float, Parameter(validator=validators.Number(gt=0))] = 10.0,
    threads: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,
    provider: ProviderName | None = None,
    verify: Path | None = None,
    json: Annotated[Path | None, Parameter(validator=validators.Path(dir_okay=False))] = None,
) -> int:
    """Measure how fast a bundle's engine is and how much memory it takes; needs no torch.

    Args:
        folder: A bundle, or a .zip of one.
        vs: Another bundle, called in turn with it.
        batch: Images per call; several with commas.
        calls: Calls of each engine at each batch size, in place of --seconds.
        seconds: How long each batch size is measured.
        threads: What ONNX Runtime computes a call with; as many as there are cores if left out.
        provider: What runs the engines within ONNX Runtime, if not what they were exported for.
        verify: Public key (PEM) that each bundle must be signed with.
        json: File to write the figures to.
    """
    if json is not None:
        writable(json, "--json")  # told now if it is not, rather than after all the calls
    sizes = [int(size) if size.isdecimal() else 0 for size in batch.split(",")]
    with shown_progress() as watch:
        found = dfq.bench(
            folder,
            vs=vs,
            batches=sizes,
            calls=calls,
            seconds=seconds,
            threads=threads,
            provider=provider,
            verify=verify,
            watch=watch,
        )
    if json is not None:
        write_json(json, found.report())
    print_engine_bench(found, json)
    return 0


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
