"""Object detection by queries, as DETR does it: a class and a box for each of a fixed number of them.

The class logits end with that of no object, and boxes are (centre x, centre y, width, height) as shares of the image.
Where each class has a sigmoid of its own, as in RT-DETR, the tensor is called `sigmoid_logits`, and there is no such
last one. What comes after, thresholds and suppression, is the user's, before and after quantization alike.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import expit, softmax

from dfq_deploy.tasks import Found, Shapes, unsuitable
from exporters.outputs import Output

__all__ = ["agree", "count_classes", "decide", "pick_outputs"]

AGREEMENT = "IoU of matched boxes"
CROP_MODE = "squash"
TAKES_ALL = False
_LEAST = 0.5  # of an image's best score: what scores less is not counted as found; random weights have scores, too
_MOST = 100  # boxes per image


def pick_outputs(shapes: Shapes) -> dict[str, str]:
    """`logits` or `sigmoid_logits`, (N, queries, classes), and `boxes` or `pred_boxes`, (N, queries, 4).

    Raises:
        ModelError: One is missing, or of another form.
    """
    logits = next((name for name in ("sigmoid_logits", "logits") if name in shapes), "")
    boxes = next((name for name in ("boxes", "pred_boxes") if name in shapes), "")
    forms = [shapes.get(name, ()) for name in (logits, boxes)]
    if not (all(len(form) == 2 for form in forms) and forms[1] == (forms[0][0], 4)):
        wanted = (
            "`logits` (N, queries, classes + 1) or `sigmoid_logits` (N, queries, classes), and `boxes` (N, queries, 4)"
        )
        raise unsuitable(shapes, "detection", wanted)
    return {logits: logits, boxes: "boxes"}


def count_classes(outputs: Sequence[Output]) -> int:
    """The number of logits per query, without that of no object."""
    return outputs[0].shape[1] - (outputs[0].name == "logits")


def decide(found: Found) -> None:  # noqa: ARG001  # the verbs of all tasks have one signature
    """Nothing: an image has many objects."""
    return


def agree(found: Found, wanted: Found) -> np.ndarray:
    """Intersection over union of the boxes that both find, matched one to one within a class.

    A box is found if its score is at least half the image's best. One that has no counterpart counts 0; two models that
    find the same agree by 1.
    """
    pairs = zip(_detections(found), _detections(wanted), strict=True)
    return np.array([_matched(*ours, *theirs) for ours, theirs in pairs])


def _detections(found: Found) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per image the boxes (n, 4) as corners, and their classes (n,), the surest first."""
    scores = expit(found["sigmoid_logits"]) if "sigmoid_logits" in found else softmax(found["logits"], -1)[..., :-1]
    x, y, width, height = np.moveaxis(found["boxes"], -1, 0)
    corners = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], -1)
    best, classes = scores.max(-1), scores.argmax(-1)
    picked = []
    for image, sure in enumerate(best):
        order = np.argsort(-sure, kind="stable")[:_MOST]
        order = order[sure[order] >= _LEAST * sure.max()]
        picked.append((corners[image][order], classes[image][order]))
    return picked


def _matched(boxes: np.ndarray, classes: np.ndarray, others: np.ndarray, theirs: np.ndarray) -> float:
    """Sum of the IoU of the pairs of the best matching, of the larger number of boxes."""
    if not len(boxes) or not len(others):  # scores that are no numbers find nothing
        return float(len(boxes) == len(others))
    overlaps = np.nan_to_num(np.where(classes[:, None] == theirs, _iou(boxes, others), 0.0))
    rows, columns = linear_sum_assignment(-overlaps)
    return float(overlaps[rows, columns].sum() / max(len(boxes), len(others)))


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes as corners: (n, 4) and (m, 4) to (n, m)."""
    low, high = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    both = np.maximum(high - low, 0.0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (a, b)]
    return np.asarray(both / np.maximum(areas[0][:, None] + areas[1] - both, 1e-12))
