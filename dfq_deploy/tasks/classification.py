"""Classification: one class for an image, the largest of its logits."""

from collections.abc import Sequence

import numpy as np

from dfq_deploy.tasks import Found, Shapes, unsuitable
from exporters.outputs import Output

__all__ = ["agree", "count_classes", "decide", "pick_outputs"]

AGREEMENT = "top-1 agreement"
CROP_MODE = "center"
TAKES_ALL = False


def pick_outputs(shapes: Shapes) -> dict[str, str]:
    """The only tensor with one axis, or the one called `logits`, of two classes or more; see `Task`.

    Raises:
        ModelError: There is none, or several that are not called so.
    """
    flat = [name for name, shape in shapes.items() if len(shape) == 1 and shape[0] > 1]
    name = "logits" if "logits" in flat else flat[0] if len(flat) == 1 else ""
    if not name:
        wanted = "one tensor (N, classes) of two classes or more, or one of them called `logits`"
        raise unsuitable(shapes, "classification", wanted)
    return {name: "logits"}


def count_classes(outputs: Sequence[Output]) -> int:
    """The number of logits."""
    return outputs[0].shape[0]


def decide(found: Found) -> np.ndarray:
    """The index of the largest logit, (N,) int64."""
    return np.asarray(found["logits"].argmax(-1))


def agree(found: Found, wanted: Found) -> np.ndarray:
    """1 where both decide for the same class, else 0."""
    return np.asarray(decide(found) == decide(wanted), np.float64)
