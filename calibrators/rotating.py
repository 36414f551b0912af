"""The model walked by a rotation: the channels that can be mixed are, and the model computes the same.

Two kinds of channels can be mixed by an orthogonal matrix that is moved into the weights on either side. Those that
blocks read from and add to, in models built like timm's VisionTransformer: LayerNorms in between commute with the
matrix, once their scales and offsets are in the layers that read them. And those of each attention head that one layer
`qkv` makes, where nothing stands between it and Q·Kᵀ: Q and K with the same matrix, and V. Each place is proved by
computation, and left as it was where the outputs move.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibrators.folds import UNCHANGED, give, holding, moved, outputs_of, put_back
from calibrators.registry import pick
from calibrators.sites import SitedLinear

__all__ = ["rotate"]

Matrix = Callable[[int], Tensor]
Turn = Callable[[Matrix], None]

_FAR = 8.0  # times an image, for what happens to large activations alone
_AT_ONCE = 256  # rows or columns of a product: large ones in float64 leave holes in memory
_PARAMETERS = ("cls_token", "dist_token", "reg_token", "pos_embed")  # what timm adds to the patches or puts beside them


def rotate(module: nn.Module, images: Tensor, names: Sequence[str]) -> list[str]:
    """Apply the rotations `names` wherever `module` computes the same, in place.

    Args:
        module: The model.
        images: What to prove that on, (N, C, H, W).
        names: The rotations.

    Returns:
        The places: `residual`, and attentions by name.
    """
    kinds = [[*_residuals(module)], [*_attentions(module)]]
    if not any(kinds):
        return []
    images = torch.cat([images, _FAR * images[:1]])
    before = outputs_of(module, images)
    matrices = [functools.cache(pick("calibrators.refine", name).rotate) for name in names]

    def rotated(places: Sequence[tuple[str, Turn]]) -> bool:
        kept = [(part, dict(part.named_parameters(recurse=False))) for part in module.modules()]
        for (_, turn), matrix in itertools.product(places, matrices):
            turn(matrix)
        same = moved(before, outputs_of(module, images)) < UNCHANGED
        if not same:
            put_back(kept)
        return same

    return [place for place, _ in holding(kinds, rotated)]


def _residuals(module: nn.Module) -> Iterator[tuple[str, Turn]]:
    """What blocks read from and add to, where it may be rotated, with a function that does it."""
    if residual := _residual(module):
        yield "residual", residual.turn


def _attentions(module: nn.Module) -> Iterator[tuple[str, Turn]]:
    """The attentions whose heads may be rotated, by name, each with a function that does it."""
    for name, attention in module.named_modules():
        qkv, proj, heads = (getattr(attention, part, None) for part in ("qkv", "proj", "num_heads"))
        if not (isinstance(qkv, SitedLinear) and isinstance(proj, SitedLinear) and isinstance(heads, int)):
            continue
        if qkv.out_features == 3 * proj.in_features and proj.in_features % heads == 0:
            yield name, _Heads(qkv, proj, heads).turn


def _residual(module: Any) -> "_Residual | None":
    """What blocks read from and add to, if the parts of `module` are called as those of timm's VisionTransformer."""
    try:
        readers = [(module.norm if isinstance(module.norm, nn.LayerNorm) else module.fc_norm, [module.head])]
        writers = [(module.patch_embed.proj, None)]
        for block in module.blocks:
            readers += [(block.norm1, [block.attn.qkv]), (block.norm2, [block.mlp.fc1])]
            writers += [(block.attn.proj, block.ls1), (block.mlp.fc2, block.ls2)]
        readers[0][1].extend(filter(None, [getattr(module, "head_dist", None)]))
        width = module.embed_dim
    except (AttributeError, TypeError):
        return None
    own = dict(module.named_parameters(recurse=False))
    parameters = [name for name in _PARAMETERS if name in own]
    scales = [getattr(scale, "gamma", None) for _, scale in writers]
    fits = [
        *(isinstance(norm, nn.LayerNorm) and norm.bias is not None and len(norm.bias) == width for norm, _ in readers),
        *(_is_reader(layer, width) for _, layers in readers for layer in layers),
        *(isinstance(layer, nn.Linear | nn.Conv2d) and len(layer.weight) == width for layer, _ in writers),
        *(own[name].shape[-1] == width for name in parameters),
        *(gamma.shape == (width,) for gamma in scales if gamma is not None),
    ]
    if not all(fits):
        return None
    return _Residual(
        width=width,
        parameters=tuple((module, name) for name in parameters),
        writers=tuple(
            (layer, None if gamma is None else scale) for (layer, scale), gamma in zip(writers, scales, strict=True)
        ),
        readers=tuple((norm, tuple(layers)) for norm, layers in readers),
    )


@dataclass(frozen=True)
class _Heads:
    """An attention whose layer `qkv` makes Q, K and V of one width, and whose `proj` reads what becomes of V."""

    qkv: SitedLinear
    proj: SitedLinear
    heads: int

    def turn(self, matrix: Matrix) -> None:
        """Rotate the channels of each head."""
        turned = matrix(self.proj.in_features // self.heads)
        _write(self.qkv, turned)
        _read(self.proj, turned)


@dataclass(frozen=True)
class _Residual:
    """The channels that blocks read from and add to.

    Attributes:
        width: How many.
        parameters: Owner and name of the tensors (…, channels) that are added to patches or stand beside them.
        writers: Layers whose outputs are added, and the layer scales in between, where there are any.
        readers: LayerNorms that read the channels, and the layers that read what those put out.
    """

    width: int
    parameters: tuple[tuple[nn.Module, str], ...]
    writers: tuple[tuple[nn.Module, Any], ...]
    readers: tuple[tuple[nn.LayerNorm, tuple[SitedLinear, ...]], ...]

    def turn(self, matrix: Matrix) -> None:
        """Rotate them all."""
        turned = matrix(self.width)
        for owner, name in self.parameters:
            give(owner, **{name: (getattr(owner, name).detach().double() @ turned.T).float()})
        for layer, scale in self.writers:
            if scale is not None:
                _write(layer, scale.gamma.detach().double().diag())
                give(scale, gamma=torch.ones_like(scale.gamma))
            _write(layer, turned)
        for norm, layers in self.readers:
            factors, offsets = norm.weight.detach().double(), norm.bias.detach().double()
            for layer in layers:
                give(layer, bias=(layer.bias.detach().double() + layer.weight.detach().double() @ offsets).float())
                _read(layer, turned @ factors.diag())
            give(norm, weight=torch.ones_like(norm.weight), bias=torch.zeros_like(norm.bias))


def _is_reader(layer: object, width: int) -> bool:
    return isinstance(layer, SitedLinear) and layer.bias is not None and layer.in_features == width


def _write(layer: Any, matrix: Tensor) -> None:
    """Let a Linear or a convolution put out `matrix` times what it did, in as many runs of channels as it has."""
    for name, tensor in layer.named_parameters(recurse=False):
        _give_product(layer, name, (-1, len(matrix), tensor[0].numel()), -1, lambda columns: matrix @ columns)


def _read(layer: SitedLinear, matrix: Tensor) -> None:
    """Let a Linear put out what it did, where what it read was `matrix.T` times what it reads from now on, likewise."""
    _give_product(layer, "weight", (-1, len(matrix)), 0, lambda rows: rows @ matrix.T)


def _give_product(
    layer: nn.Module, name: str, shape: tuple[int, ...], along: int, product: Callable[[Tensor], Tensor]
) -> None:
    """Give `layer` the `product` of its tensor `name`, seen in `shape`, part by part along a dimension."""
    tensor = layer.get_parameter(name)
    turned = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    parts = (torch.split(each.detach().reshape(shape), _AT_ONCE, along) for each in (tensor, turned))
    for old, new in zip(*parts, strict=True):
        new.copy_(product(old.double()))
    give(layer, **{name: turned})
