"""Semantic segmentation: a class for every place of an image, the largest of the logits there."""

from collections.abc import Sequence

import numpy as np

from dfq_deploy.tasks import Found, Shapes, unsuitable
from exporters.outputs import Output

__all__ = ["agree", "count_classes", "decide", "pick_outputs"]

AGREEMENT = "pixel agreement"
CROP_MODE = "squash"
TAKES_ALL = False


def pick_outputs(shapes: Shapes) -> dict[str, str]:
    """The tensor (N, classes, H, W) called `logits` or, by torchvision, `out`, or the only one of that form.

    Raises:
        ModelError: There is none, it has one class, or there are several by other names.
    """
    dense = [name for name, shape in shapes.items() if len(shape) == 3 and shape[0] > 1]
    name = next((name for name in ("logits", "out") if name in dense), dense[0] if len(dense) == 1 else "")
    if not name:
        raise unsuitable(shapes, "segmentation", "one tensor (N, classes, H, W) of two classes or more")
    return {name: "logits"}


def count_classes(outputs: Sequence[Output]) -> int:
    """The number of logits per place."""
    return outputs[0].shape[0]


def decide(found: Found) -> None:  # noqa: ARG001  # the verbs of all tasks have one signature
    """Nothing: an image has many classes."""
    return


def agree(found: Found, wanted: Found) -> np.ndarray:
    """Share of an image's places that both give the same class."""
    same = found["logits"].argmax(1) == wanted["logits"].argmax(1)
    return np.asarray(same.mean((1, 2)))
