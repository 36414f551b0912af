"""Commands that show what lies here, or write it in the format of another tool."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, validators

import dfq_deploy as dfq
from dfq_deploy.progress import shown_progress
from dfq_deploy.showing.bundles import print_converted, print_path
from dfq_deploy.showing.checks import print_report
from dfq_deploy.showing.doctor import print_findings

__all__ = ["convert", "doctor", "report", "show"]


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
    print_converted(file, out, to)
    return 0


def doctor() -> int:
    """Say what is installed, what that enables, and what would go wrong."""
    return print_findings(dfq.diagnose())


def report(
    folder: Path,
    /,
    *,
    out: Annotated[Path | None, Parameter(validator=validators.Path(dir_okay=False))] = None,
    compare: Path | None = None,
    quick: Annotated[bool, Parameter(negative=())] = False,
    checkpoint: Path | None = None,
    verify: Path | None = None,
) -> int:
    """Write what is known of a bundle as one HTML file that loads nothing.

    Args:
        folder: A bundle, or a .zip of one, which needs --out.
        out: File to write. Without it report.html in the bundle, or compare.html.
        compare: Another bundle, to put beside it.
        quick: Measure nothing but time. Without it the first report of a bundle also measures which layers hurt, and
            its calibration images against noise.
        checkpoint: Where the weights lie now.
        verify: Public key (PEM) that what is reported must be signed with.
    """
    with shown_progress() as watch:
        found = dfq.report(
            folder, out=out, compare=compare, quick=quick, checkpoint=checkpoint, verify=verify, watch=watch
        )
    print_report(found)
    return 0


def show(path: Path, /, *, verify: Path | None = None) -> int:
    """Show what a bundle, a plan or an ImageSet file holds.

    Args:
        path: A bundle's folder or a .zip of it, or a .safetensors file.
        verify: Public key (PEM) that the bundle must be signed with.
    """
    print_path(path, verify)
    return 0
