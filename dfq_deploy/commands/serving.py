"""Commands that put a bundle where clients reach it; they need no torch."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

import dfq_deploy as dfq
from dfq_deploy import show_serving as shown
from dfq_deploy.serving.options import RepoOptions, ServeOptions

__all__ = ["serve", "serve_repo"]

_SERVE, _REPO = ServeOptions(), RepoOptions()


def serve(folder: Path, /, options: Annotated[ServeOptions, Parameter(name="*")] = _SERVE) -> int:
    """Answer over HTTP, by the KServe v2 inference protocol, until stopped; needs the extra `serve`.

    Args:
        folder: A bundle with a built engine.
        options: How to serve.
    """
    shown.print_tally(dfq.serve(folder, options, listening=shown.print_listening))
    return 0


def serve_repo(folder: Path, /, options: Annotated[RepoOptions, Parameter(name="*")] = _REPO, *, out: Path) -> int:
    """Write a model repository for NVIDIA Triton Inference Server.

    Args:
        folder: A bundle with a built engine.
        options: What its configuration says.
        out: Folder to write, where nothing is yet.
    """
    shown.print_repository(dfq.serve_repo(folder, out, options))
    return 0
