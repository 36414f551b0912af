"""Commands that run an engine; they need no torch."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

import dfq_deploy as dfq
from dfq_deploy.recipe import ProviderName
from dfq_deploy.showing.engine import print_answers, print_answers_as_json

__all__ = ["infer"]

_ERROR = 3


def infer(
    folder: Path,
    image: Path,
    /,
    *more: Path,
    top: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 5,
    json: Annotated[bool, Parameter(negative=())] = False,
    provider: ProviderName | None = None,
    verify: Path | None = None,
) -> int:
    """Classify images with a bundle's engine, past those that cannot be read; needs no torch.

    Args:
        folder: A bundle, or a .zip of one.
        image: An image file.
        more: Further image files.
        top: How many classes to show.
        json: Print a JSON list with an object for each image.
        provider: What runs the engine within ONNX Runtime, if not what it was exported for.
        verify: Public key (PEM) that the bundle must be signed with.
    """
    answers = dfq.infer(folder, (image, *more), top=top, provider=provider, verify=verify)
    (print_answers_as_json if json else print_answers)(answers)
    return _ERROR if any(answer.error for answer in answers) else 0
