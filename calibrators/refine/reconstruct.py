"""Reconstruction: weights, norms and scales of one block are learned until it puts out what the float model's does.

The block's inputs are those of the quantized model, so that it makes up for the blocks before, too.

Source: Li et al., "BRECQ", arXiv 2102.05426, sec. 3.2, for blocks as units; Zhong et al., "SARDFQ", arXiv 2412.16553,
for min ||X - X'|| by Adam with a cosine. There weights alone are learned; here scales, zero-points, biases and norms
are as well, and each token counts by the size of what the float model puts out.
"""

import torch

from calibrators.learned import Learned
from calibrators.refine import Block

__all__ = ["reconstruct"]

_STEPS = 100
_BATCH = 8
_WEIGHTS = 4e-5  # learning rate
_SCALES = 0.005  # learning rate, relative to the scale
_ZEROS = 0.05  # learning rate, in codes
_SEED = 0


def reconstruct(block: Block) -> None:
    """Change the block's weights and the scales of its sites."""
    learned = Learned(block.module, block.sites)
    optimizer = torch.optim.Adam(
        [
            {"params": list(block.module.parameters()), "lr": _WEIGHTS},
            {"params": list(learned.zeros.values()), "lr": _ZEROS},
            *({"params": [scale], "lr": _SCALES * float(scale.mean())} for scale in learned.scales.values()),
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    generator = torch.Generator().manual_seed(_SEED)
    with torch.enable_grad():
        for _ in range(_STEPS):
            chosen = torch.randperm(len(block.wanted), generator=generator)[:_BATCH]
            wanted = block.wanted[chosen]
            errors = (block.compute(block.arriving[chosen]) - wanted).square().sum(-1)
            loss = (errors / wanted.square().sum(-1).clamp(min=1e-12)).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            block.losses.append(float(loss.detach()))
    block.sites = learned.settle()
