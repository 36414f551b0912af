"""The command line: a command is a function, its flags are the fields of a recipe.

Nothing is computed here. Errors come out as three lines, results as tables; the exit code is 0 for pass, 1 for fail,
2 for undecided and 3 for a wrong call or an error.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import cyclopts
from cyclopts import Parameter, validators

import dfq_deploy as dfq
from calibrators.errors import DeployError
from dfq_deploy import show as shown
from dfq_deploy.bench_cli import bench
from dfq_deploy.messages import notes_in_one_line, print_error
from dfq_deploy.progress import shown_progress
from dfq_deploy.recipe import (
    AuditRecipe,
    BackendName,
    CalibrateRecipe,
    GenerateRecipe,
    ProviderName,
    Recipe,
    SimulateRecipe,
    fields_in,
)
from dfq_deploy.show_sets import print_audit

__all__ = ["app", "main"]

_EXIT = {"pass": 0, "fail": 1, "undecided": 2, "good": 0, "bad": 1, "doubtful": 2}
_ERROR = 3
_AUDIT_OF_A_BUNDLE = AuditRecipe()

app = cyclopts.App(
    name="dfq-deploy",
    help="Quantize a vision transformer with no data, build its engine, and prove what the engine computes.",
    version=dfq.__version__,
    help_format="plaintext",
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # `run` says it in three lines
)
app.meta.suppress_keyboard_interrupt = False  # which cyclopts does not pass on


@app.command
def export(
    recipe: Annotated[Recipe, Parameter(name="*")],
    *,
    out: Path,
    images: str | None = None,
    limit: int | None = None,
) -> int:
    """Make a checked engine: model, images, plan, ONNX, engine, check.

    Args:
        recipe: The run.
        out: Folder of the bundle; a run that was cut off goes on where it was.
        images: Check on these: folder:PATH, npz:PATH or an ImageSet file.
        limit: Check on this many of them, evenly spaced.
    """
    with shown_progress() as watch:
        found = dfq.export(recipe, out, images=images, limit=limit, watch=watch)
    shown.print_check(found, out)
    return _EXIT[found.verdict]


@app.command
def generate(recipe: Annotated[GenerateRecipe, Parameter(name="*")], *, out: Path) -> int:
    """Make synthetic calibration images out of the model itself.

    Args:
        recipe: The model and the method.
        out: File to write, .safetensors.
    """
    with shown_progress() as watch:
        images = dfq.generate(recipe, out, watch=watch)
    shown.print_images(images, out)
    return 0


@app.command
def calibrate(recipe: Annotated[CalibrateRecipe, Parameter(name="*")], *, out: Path) -> int:
    """Make a plan of scales from calibration images.

    Args:
        recipe: The model, the images and the number formats.
        out: File to write, .safetensors.
    """
    with shown_progress() as watch:
        plan = dfq.calibrate(recipe, out, watch=watch)
    shown.print_plan(plan)
    return 0


@app.command
def audit(
    images: str, /, recipe: Annotated[AuditRecipe, Parameter(name="*")] = _AUDIT_OF_A_BUNDLE, *, out: Path
) -> int:
    """Compare the ranges that calibration images give with those of noise, another seed and real images.

    Args:
        images: folder:PATH, npz:PATH, an ImageSet file, or a bundle: the images that it was calibrated on.
        recipe: The model and what to compare with.
        out: Folder to write: audit.json and pictures.
    """
    with shown_progress() as watch:
        found = dfq.audit(images, recipe, out, watch=watch)
    print_audit(found, out)
    return _EXIT[found.level]


@app.command
def build(folder: Path, /, *, backend: BackendName | None = None) -> int:
    """Build the engine of a bundle on the machine that will run it; needs no torch.

    Args:
        folder: A bundle whose engine is pending, or was made for another GPU or version.
        backend: Build for this run-time instead of the one that it was exported for.
    """
    manifest = dfq.build(folder, backend=backend)
    shown.print_engine(manifest.engine, folder)
    return 0 if manifest.engine.state == "built" else _EXIT["undecided"]


@app.command
def check(
    folder: Path, /, *, images: str | None = None, limit: int | None = None, checkpoint: Path | None = None
) -> int:
    """Compare an engine with its PyTorch reference and with the float model.

    Args:
        folder: A bundle.
        images: folder:PATH, npz:PATH or an ImageSet file. Without it: the labelled images that come with the model,
            else the images that it was calibrated on.
        limit: Use this many of them, evenly spaced.
        checkpoint: Where the weights lie now.
    """
    with shown_progress() as watch:
        found = dfq.check(folder, images=images, limit=limit, checkpoint=checkpoint, watch=watch)
    shown.print_check(found, folder)
    return _EXIT[found.verdict]


@app.command
def sensitivity(
    folder: Path,
    /,
    *,
    images: str | None = None,
    limit: int = 16,
    checkpoint: Path | None = None,
    json: Annotated[Path | None, Parameter(validator=validators.Path(dir_okay=False))] = None,
    plot: Annotated[Path | None, Parameter(validator=validators.Path(ext=("pdf", "png", "svg")))] = None,
) -> int:
    """Show which layers of a bundle quantization hurts most, and what sparing each would gain.

    Args:
        folder: A bundle; its engine is not run.
        images: folder:PATH, npz:PATH or an ImageSet file; labels are not needed. Without it: the images that it was
            calibrated on, or noise where those are gone.
        limit: Use this many of them, evenly spaced.
        checkpoint: Where the weights lie now.
        json: File for all the numbers.
        plot: File for a bar chart, .png, .svg or .pdf.
    """
    draw = None if plot is None else dfq.plot_sensitivity  # told now if matplotlib is missing, not at the end
    with shown_progress() as watch:
        found = dfq.sensitivity(folder, images=images, limit=limit, checkpoint=checkpoint, watch=watch)
    shown.print_sensitivity(found)
    if json is not None:
        found.save(json)
    if plot is not None and draw is not None:
        draw(found, plot)
    return 0


@app.command
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
    shown.print_simulation(found, out)
    return 0


@app.command
def infer(
    folder: Path,
    image: Path,
    /,
    *more: Path,
    top: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 5,
    provider: ProviderName | None = None,
) -> int:
    """Classify images with a bundle's engine; needs no torch.

    Args:
        folder: A bundle.
        image: An image file.
        more: Further image files.
        top: How many classes to show.
        provider: What runs the engine within ONNX Runtime, if not what it was exported for.
    """
    with dfq.load(folder, provider=provider) as runner:
        for path in (image, *more):
            shown.print_classes(runner, path, top)
    return 0


@app.command
def show(path: Path, /) -> int:
    """Show what a bundle, a plan or an ImageSet file holds.

    Args:
        path: A bundle's folder, or a .safetensors file.
    """
    shown.print_path(path)
    return 0


@app.command
def convert(
    file: Path,
    /,
    *,
    to: Literal["npz", "folder", "polygraphy", "cache"],
    out: Path,
    onnx: Path | None = None,
    tensorrt: str | None = None,
) -> int:
    """Write images or a plan in the format of another tool.

    Args:
        file: An ImageSet file; a plan for cache.
        to: Images as a NumPy archive, as a folder of PNGs (8 bits) or as polygraphy's inputs; a plan as TensorRT's
            calibration cache.
        out: File or folder to write.
        onnx: For cache: the float model that TensorRT gets, whose tensors the cache shall name.
        tensorrt: For cache: version of the TensorRT that shall read it, such as 10.16.1.
    """
    dfq.convert(file, out, to=to, onnx=onnx, tensorrt=tensorrt)
    shown.print_converted(file, out, to)
    return 0


@app.command
def doctor() -> int:
    """Say what is installed, what that enables, and what would go wrong."""
    return shown.print_findings(dfq.diagnose())


app.command(bench)


@app.meta.default
def _with_recipe(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    recipe: Annotated[Path | None, Parameter(help="TOML file with the same fields as the flags; flags win.")] = None,
) -> int:
    app.config = ()
    if recipe is not None:
        app.config = cyclopts.config.Dict(fields_in(recipe), source=str(recipe), use_commands_as_keys=False)
    result: int = app(tokens, exit_on_error=False, print_error=False)
    return result


def main() -> None:
    """Run the command line and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; returns its exit code, and prints nothing but messages whatever the input."""
    try:
        with notes_in_one_line():
            result = app.meta(arguments, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as wrong:
        return _told(str(wrong), "the command line does not read.", "see dfq-deploy --help, or --help after a command.")
    except DeployError as error:
        return _told(error.what, error.why, error.fix)
    except OSError as error:
        return _told(f"{error}.", "the file system refused it.", "check the path, its permissions and the free space.")
    except KeyboardInterrupt:
        return _told("stopped.", "you interrupted the run.", "run the same command again: finished stages are kept.")
    return result if isinstance(result, int) else 0


def _told(what: str, why: str, fix: str) -> int:
    print_error(what, why, fix)
    return _ERROR
