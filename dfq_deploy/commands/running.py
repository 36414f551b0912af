"""Commands that run an engine; they need no torch."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

import dfq_deploy as dfq
from dfq_deploy import show_engine as shown
from dfq_deploy.recipe import ProviderName

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
) -> int:
    """Classify images with a bundle's engine, past those that cannot be read; needs no torch.

    Args:
        folder: A bundle.
        image: An image file.
        more: Further image files.
        top: How many classes to show.
        json: Print a JSON list with an object for each image.
        provider: What runs the engine within ONNX Runtime, if not what it was exported for.
    """
    answers = dfq.infer(folder, (image, *more), top=top, provider=provider)
    (shown.print_answers_as_json if json else shown.print_answers)(answers)
    return _ERROR if any(answer.error for answer in answers) else 0
