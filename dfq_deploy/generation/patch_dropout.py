"""Patch dropout: in each step of synthesis the network is given another half of the patches, at half the cost.

For timm's VisionTransformer, whose blocks take any number of tokens. Other models, which may have windows, stages or
positions in their attention, are given all patches.

Source: Liu et al., "PatchDropout", arXiv 2208.07220, where it makes training cheaper. There each image keeps patches of
its own; here all images of a step keep the same ones, so that nothing has to be gathered per image.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dfq_deploy.generation.taps import AttentionTap

__all__ = ["PatchDropout"]

_KINDS = VisionTransformer, VisionTransformerDistilled  # of others nobody knows what their forward pass counts on
_FEWEST = 4  # patches that can be halved: two that are left can still differ


@dataclass(frozen=True)
class PatchDropout:
    """The tokens that are kept in each step.

    Attributes:
        layer: Where the others leave the network: every token passes it once, on the way to the first block.
        tokens: Numbers of the tokens that go on, in order, (steps, kept) int64: the class token and others that are
            no patches, and half of the patches.
        patches: How many patches are kept.
    """

    layer: nn.Module
    tokens: Tensor
    patches: int

    @classmethod
    def drawn(
        cls, module: nn.Module, taps: Sequence[AttentionTap], steps: int, generator: torch.Generator
    ) -> "PatchDropout | None":
        """A half for every step, which `generator` draws on the CPU; None for a model that has to see all patches."""
        if type(module) not in _KINDS or not isinstance(module.patch_drop, nn.Identity):
            return None
        prefix, patches = taps[0].prefix, taps[0].tokens
        if patches < _FEWEST or any((tap.windows, tap.tokens) != (1, patches) for tap in taps):
            return None
        kept = patches // 2
        chosen = torch.rand((steps, patches), generator=generator).argsort(1)[:, :kept].sort(1).values + prefix
        tokens = torch.cat([torch.arange(prefix).expand(steps, prefix), chosen], 1)
        return cls(module.patch_drop, tokens.to(taps[0].layer.weight.device), kept)

    @contextlib.contextmanager
    def during(self, step: int) -> Iterator[None]:
        """Within the block, the network computes with the tokens of step number `step`, from 0."""
        handle = self.layer.register_forward_hook(lambda _layer, _inputs, tokens: tokens[:, self.tokens[step]])
        try:
            yield
        finally:
            handle.remove()
