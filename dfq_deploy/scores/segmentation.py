"""mIoU of a semantic segmentation; the truth of an image is the class of each place, (H, W).

Logits are enlarged to the truth's size before the largest is taken. Places with a class that the model does not have,
such as 255, are not counted, and neither are classes that neither truth nor model has anywhere.

Source: torchmetrics' confusion matrix over all images, as the benchmarks have it; not a mean over images.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix

__all__ = ["add", "metric", "read"]


def metric(classes: int) -> MulticlassConfusionMatrix:
    """How often which class was taken for which, (classes, classes)."""
    return MulticlassConfusionMatrix(classes, ignore_index=classes)


def add(metric: Any, found: dict[str, Tensor], truth: list[Any]) -> None:
    """Show it a batch, see `Score`."""
    for logits, wanted in zip(found["logits"], truth, strict=True):
        classes = torch.as_tensor(wanted).long()
        enlarged = F.interpolate(logits[None], size=classes.shape, mode="bilinear", align_corners=False)
        known = (classes >= 0) & (classes < len(logits))
        metric.update(enlarged.argmax(1), torch.where(known, classes, len(logits))[None])


def read(metric: Any) -> dict[str, float]:
    """Mean over the classes of intersection over union."""
    counts = metric.compute().double()
    both, either = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    return {"mIoU": 100 * float((both / either)[either > 0].mean())}
