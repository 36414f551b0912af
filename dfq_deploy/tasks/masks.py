"""Promptable segmentation: a mask for each prompt, or several to choose from; what is above 0 belongs to it."""

from collections.abc import Sequence

import numpy as np

from dfq_deploy.tasks import Found, Shapes, unsuitable
from exporters.outputs import Output

__all__ = ["agree", "count_classes", "decide", "pick_outputs"]

AGREEMENT = "mask IoU"
CROP_MODE = "squash"
TAKES_ALL = False


def pick_outputs(shapes: Shapes) -> dict[str, str]:
    """The tensor (N, masks, H, W) called `masks` or, by transformers, `pred_masks`, or the only one of that form.

    Raises:
        ModelError: There is none, or there are several by other names.
    """
    dense = [name for name, shape in shapes.items() if len(shape) == 3]
    name = next((name for name in ("masks", "pred_masks") if name in dense), dense[0] if len(dense) == 1 else "")
    if not name:
        raise unsuitable(shapes, "masks", "one tensor (N, masks, H, W) of logits")
    return {name: "masks"}


def count_classes(outputs: Sequence[Output]) -> int:  # noqa: ARG001  # the verbs of all tasks have one signature
    """None: a mask is of whatever the prompt was on."""
    return 0


def decide(found: Found) -> None:  # noqa: ARG001
    """Nothing: an image has many masks."""
    return


def agree(found: Found, wanted: Found) -> np.ndarray:
    """Intersection over union of a mask and its counterpart, the mean over an image's; of two empty ones 1."""
    first, second = (part["masks"] > 0 for part in (found, wanted))
    both, either = (first & second).sum((2, 3)), (first | second).sum((2, 3))
    return np.asarray(np.where(either == 0, 1.0, both / np.maximum(either, 1)).mean(1))
