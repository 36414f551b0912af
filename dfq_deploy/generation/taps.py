"""Taps: what recipes look at inside a model.

A tap is a layer whose input is captured while images pass. `attention_taps` finds the layers that softmax·V goes
into, by name in any timm attention, else by watching. No loss and no schedule here.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibrators.errors import ImagesError
from dfq_deploy.generation.discovery import attentions_of, has_class_token, owner_of, prefix_of
from dfq_deploy.models import Model

__all__ = ["AttentionTap", "attention_taps", "captured", "probe"]


@contextlib.contextmanager
def captured(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """A dict that holds, after each forward pass within the block, the input of each layer under its name.

    A layer that no pass reaches, or calls by keyword, has no entry. The hooks are gone when the block ends.
    """
    inputs: dict[str, Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(functools.partial(_keep, inputs, name))
            hooks.callback(handle.remove)
        yield inputs


def _keep(inputs: dict[str, Tensor], name: str, _layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    if arguments:
        inputs[name] = arguments[0]


@dataclass(frozen=True)
class AttentionTap:
    """One attention's output projection, whose input is softmax·V with the heads side by side.

    Attributes:
        name: The projection's name, `blocks.3.attn.proj`.
        layer: The projection.
        attention: The module that it is part of.
        heads: Number of attention heads.
        windows: Windows per image; 1 where attention is global.
        prefix: Tokens in front of the patches: class and distillation tokens, registers.
        tokens: Patch tokens per window.
        class_token: Whether the first token in front of the patches is the class token.
    """

    name: str
    layer: nn.Linear
    attention: nn.Module
    heads: int
    windows: int
    prefix: int
    tokens: int
    class_token: bool

    def contexts(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """softmax·V of every patch, (B, windows, tokens, heads, head_dim) float32, from what `captured` holds.

        Where a model scales or gates softmax·V before the projection (timm's `scale_norm`, `gated`), that is in it.
        """
        rows = inputs[self.name].float()  # (B * windows, prefix + tokens, heads * head_dim)
        split = rows.reshape(-1, self.windows, self.prefix + self.tokens, self.heads, rows.shape[-1] // self.heads)
        return split[:, :, self.prefix :]


def attention_taps(model: Model) -> list[AttentionTap]:
    """The attentions of `model`, in its order: modules with `num_heads` whose `proj` is a Linear, else what is seen.

    Class attentions and pooling heads see no two patches side by side and are left out.

    Raises:
        ImagesError: There is none.
    """
    attentions = {
        f"{name}.proj": module
        for name, module in model.module.named_modules()
        if isinstance(getattr(module, "proj", None), nn.Linear) and isinstance(getattr(module, "num_heads", None), int)
    }
    with torch.no_grad(), captured({name: attention.proj for name, attention in attentions.items()}) as inputs:
        model.module(probe(model))
    taps = [
        _tap(model.module, name, attention, inputs[name].shape)
        for name, attention in attentions.items()
        if name in inputs
    ]
    taps = [tap for tap in taps or _watched(model) if tap.tokens >= 2]
    if not taps:
        raise ImagesError(
            what=f"`{model.name}` shows no attention to synthesise images from.",
            why="this recipe looks at softmax·V of patches: the input of a Linear `proj` beside `num_heads`.",
            fix="use the generator `dead_leaves`, for a CNN `zeroq`, or real images.",
        )
    return taps


def _watched(model: Model) -> list[AttentionTap]:
    """The self-attentions of a model that is not timm's. What it puts behind the patches counts as a patch."""
    with torch.no_grad():
        found = attentions_of(model.module, probe(model))
    taps = []
    for one in found:
        layer, windows = model.module.get_submodule(one.projection), one.rows // _PROBE
        owner = owner_of(model.module, one.module)
        prefix = prefix_of(owner) if windows == 1 else 0
        class_token = prefix > 0 and has_class_token(owner)
        assert isinstance(layer, nn.Linear)
        attention = model.module.get_submodule(one.module)
        tokens = one.tokens - prefix
        taps.append(AttentionTap(one.projection, layer, attention, one.heads, windows, prefix, tokens, class_token))
    return taps


def probe(model: Model) -> Tensor:
    """Blank images that show the shapes of what the model computes."""
    return torch.zeros(_PROBE, *model.preprocess.shape, device=next(model.module.parameters()).device)


_PROBE = 2  # images that show the shapes; more than 1, so that windows and images can be told apart


def _tap(module: nn.Module, name: str, attention: nn.Module, shape: torch.Size) -> AttentionTap:
    windows, tokens = shape[0] // _PROBE, shape[1:-1].numel()
    owner = owner_of(module, name.rpartition(".")[0])
    prefix = prefix_of(owner)
    patches = getattr(getattr(owner, "patch_embed", None), "num_patches", None)
    if windows > 1 or len(shape) > 3 or tokens == patches:
        prefix = 0  # windows and grids are of patches alone; CaiT, VOLO and XCiT add the class token later
    assert isinstance(attention.proj, nn.Linear) and isinstance(attention.num_heads, int)
    heads, class_token = attention.num_heads, prefix > 0 and has_class_token(owner)
    return AttentionTap(name, attention.proj, attention, heads, windows, prefix, tokens - prefix, class_token)
