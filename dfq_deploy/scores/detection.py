"""mAP of a detection; the truth of an image is a dict of `boxes` (n, 4) and `labels` (n,).

Boxes are (centre x, centre y, width, height) as shares of the image, as the model puts them out. Each query counts
once, as its best class.

Source: COCO's mean average precision, by torchmetrics.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

__all__ = ["add", "metric", "read"]


def metric(classes: int) -> MeanAveragePrecision:  # noqa: ARG001  # the verbs of all scores have one signature
    """COCO's."""
    return MeanAveragePrecision(box_format="cxcywh")


def add(metric: Any, found: dict[str, Tensor], truth: list[Any]) -> None:
    """Show it a batch, see `Score`."""
    sigmoids = "sigmoid_logits" in found
    shares = found["sigmoid_logits"].sigmoid() if sigmoids else found["logits"].softmax(-1)[..., :-1]
    scores, labels = shares.max(-1)
    fields = zip(found["boxes"], scores, labels, strict=True)
    wanted = [{name: torch.as_tensor(one[name]) for name in ("boxes", "labels")} for one in truth]
    metric.update([dict(zip(("boxes", "scores", "labels"), field, strict=True)) for field in fields], wanted)


def read(metric: Any) -> dict[str, float]:
    """Mean over classes and over overlaps of 0.5 to 0.95, and at 0.5."""
    found = metric.compute()
    return {"mAP": 100 * float(found["map"]), "mAP50": 100 * float(found["map_50"])}
