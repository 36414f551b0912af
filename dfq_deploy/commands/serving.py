"""Commands that put a bundle where clients reach it; they need no torch."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

import dfq_deploy as dfq
from dfq_deploy.serving.options import RepoOptions, ServeOptions
from dfq_deploy.showing.serving import print_listening, print_repository, print_tally

__all__ = ["serve", "serve_repo"]

_SERVE, _REPO = ServeOptions(), RepoOptions()


def serve(folder: Path, /, options: Annotated[ServeOptions, Parameter(name="*")] = _SERVE) -> int:
    """Answer over HTTP, by the KServe v2 inference protocol, until stopped; needs the extra `serve`.

    Args:
        folder: A bundle with a built engine, or a .zip of one.
        options: How to serve.
    """
    print_tally(dfq.serve(folder, options, listening=print_listening))
    return 0


def serve_repo(folder: Path, /, options: Annotated[RepoOptions, Parameter(name="*")] = _REPO, *, out: Path) -> int:
    """Write a model repository for NVIDIA Triton Inference Server.

    Args:
        folder: A bundle with a built engine, or a .zip of one.
        options: What its configuration says.
        out: Folder to write, where nothing is yet.
    """
    print_repository(dfq.serve_repo(folder, out, options))
    return 0
