"""A vision transformer of one block, not timm's, which puts out what it is told to: what tests of tasks share."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["EXAMPLE", "Small"]

EXAMPLE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Small(nn.Module):
    """Patches of 8 pixels, two heads of attention, and outputs as the task has them."""

    def __init__(self, task: str, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Linear(16, 6)  # first in the module, last in a pass
            self.stem = nn.Conv2d(3, 16, 8, 8)
            self.qkv, self.merge = nn.Linear(16, 48), nn.Linear(16, 16)
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.task = task

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).reshape(-1, 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
        tokens = tokens + self.merge(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        tokens = tokens + self.down(F.gelu(self.up(tokens)))
        found = self.head(tokens)
        if self.task == "classification":
            return found.mean(1)
        if self.task in ("segmentation", "masks"):
            return found.transpose(1, 2).unflatten(2, (4, 4))
        if self.task == "detection":
            return {"logits": found, "pred_boxes": found[..., :4].sigmoid(), "hidden": tokens}
        return {"tokens": tokens, "pooled": tokens.mean(1)}
