"""Commands that run an engine; they need no torch."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

import dfq_deploy as dfq
from dfq_deploy import show as shown
from dfq_deploy.recipe import ProviderName

__all__ = ["infer"]


def infer(
    folder: Path,
    image: Path,
    /,
    *more: Path,
    top: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 5,
    provider: ProviderName | None = None,
    verify: Path | None = None,
) -> int:
    """Classify images with a bundle's engine; needs no torch.

    Args:
        folder: A bundle, or a .zip of one.
        image: An image file.
        more: Further image files.
        top: How many classes to show.
        provider: What runs the engine within ONNX Runtime, if not what it was exported for.
        verify: Public key (PEM) that the bundle must be signed with.
    """
    with dfq.load(folder, provider=provider, verify=verify) as runner:
        for path in (image, *more):
            shown.print_classes(runner, path, top)
    return 0
