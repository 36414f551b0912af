"""A detector of torchvision, the control with a convolutional head: wrapped before its suppression, random weights."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.image_list import ImageList

import dfq_deploy as dfq

EDGE = 320


class _BeforeSuppression(nn.Module):
    """Every box of an SSD with its classes, in the form that the task `detection` takes."""

    anchors: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        ssd = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=8).eval()
        self.backbone, self.head = ssd.backbone, ssd.head
        images = torch.zeros(1, 3, EDGE, EDGE)
        maps = list(self.backbone(images).values())
        (corners,) = ssd.anchor_generator(ImageList(images, [(EDGE, EDGE)]), maps)
        low, high = (corners / EDGE).chunk(2, dim=1)
        self.register_buffer("anchors", torch.cat([(low + high) / 2, high - low], dim=1))
        self.register_buffer("steps", 1 / torch.tensor(ssd.box_coder.weights))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found = self.head(list(self.backbone(images).values()))
        shift, growth = (found["bbox_regression"] * self.steps).chunk(2, dim=2)
        centre, size = self.anchors.chunk(2, dim=1)
        boxes = torch.cat([centre + shift * size, size * growth.exp()], dim=2)
        return {"logits": found["cls_logits"].roll(-1, dims=2), "boxes": boxes}  # no object comes first there


def test_a_detector_of_torchvision_is_exported(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _BeforeSuppression()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):  # as they start, the network puts out the same for every image
                nn.init.normal_(part.weight, 2.0, 0.2)
                nn.init.normal_(part.bias, 0.0, 0.5)
    half = (0.5,) * 3
    model = dfq.wrap(module, torch.zeros(1, 3, EDGE, EDGE), "detection", mean=half, std=half)
    found = dfq.export(model, tmp_path / "run", generator="noise", count=8, refine="none", spare="massive", limit=8)
    assert found.verdict == "pass", found.reason
    assert found.engine.census.counts["int8"] > 80
    assert found.agreement["engine_reference"].percent >= 99
