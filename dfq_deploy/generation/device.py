"""The device that images are made on: chosen, and the model moved there and back.

Calibration, the reference and the export stay on the CPU, where one seed gives the same bytes.
"""

import contextlib
from collections.abc import Iterator

import torch

from calibrators.errors import RecipeError
from dfq_deploy.models import Model

__all__ = ["device_named", "moved_to"]


def device_named(name: str) -> str:
    """`cpu` or `cuda` for what the user asked for; `auto` is the GPU where there is one.

    Raises:
        RecipeError: It was to be a GPU, and PyTorch finds none.
    """
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise RecipeError(
            what="there is no GPU to make images on.",
            why=f"PyTorch {torch.__version__} finds no CUDA device.",
            fix="use --device cpu, or check the driver with dfq-deploy doctor.",
        )
    return name if name != "auto" else "cuda" if found else "cpu"


@contextlib.contextmanager
def moved_to(device: str, model: Model) -> Iterator[None]:
    """A block in which the weights of `model` lie on `device`."""
    before = next(model.module.parameters()).device
    model.module.to(device)
    try:
        yield
    finally:
        model.module.to(before)
