"""Folds: places where a change of an activation can be moved into the weights on either side of it.

What a LayerNorm puts out goes through its own weight and bias; V reaches the output projection through the attention
matrix, whose rows sum to one. Either can be divided by a factor per channel, or have a constant taken off per channel,
if the layers that read it undo that: the model computes the same, and its activations quantize better. Folds are found
by what passes through the model, and each is proved by computation before anybody uses it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from calibrators.sites import SitedLinear

__all__ = [
    "UNCHANGED",
    "Fold",
    "find_folds",
    "give",
    "holding",
    "layers_of",
    "moved",
    "outputs_of",
    "put_back",
    "weights_at",
]

UNCHANGED = 1e-5  # of the largest output: float32 sums in another order differ by 1e-6

Place = TypeVar("Place")
Weights = list[tuple[nn.Module, dict[str, nn.Parameter]]]


@dataclass(frozen=True, eq=False)
class Fold:
    """An activation between one producer and its readers.

    Attributes:
        name: The first reader's name.
        rows: The producer's output channels that make up the activation.
        producer: A LayerNorm, or the Linear that makes V.
        readers: The layers that read the activation, and nothing else does.
    """

    name: str
    rows: slice
    producer: nn.LayerNorm | SitedLinear
    readers: tuple[SitedLinear, ...]

    def divide(self, factors: Tensor) -> None:
        """Divide the activation by `factors`, (channels,), and multiply the readers' weight columns by them."""
        assert self.producer.weight is not None and self.producer.bias is not None
        weight, bias = self.producer.weight.detach().clone(), self.producer.bias.detach().clone()
        weight[self.rows] /= factors if weight.ndim == 1 else factors[:, None]
        bias[self.rows] /= factors
        give(self.producer, weight=weight, bias=bias)
        for reader in self.readers:
            give(reader, weight=reader.weight.detach() * factors)

    def lower(self, offsets: Tensor) -> None:
        """Take `offsets`, (channels,), off the activation, and add what they contribute to the readers' biases."""
        assert self.producer.bias is not None
        bias = self.producer.bias.detach().clone()
        bias[self.rows] -= offsets
        give(self.producer, bias=bias)
        for reader in self.readers:
            assert reader.bias is not None
            give(reader, bias=reader.bias.detach() + reader.weight.detach() @ offsets)


def give(layer: nn.Module, **tensors: Tensor) -> None:
    """Give `layer` these weights in place of its own, which stay as they are for whoever else has them."""
    for name, tensor in tensors.items():
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False))


def weights_at(folds: Sequence[Fold]) -> Weights:
    """The weights that `folds` change, for `put_back`."""
    layers = dict.fromkeys(layer for fold in folds for layer in (fold.producer, *fold.readers))
    return [(layer, dict(layer.named_parameters(recurse=False))) for layer in layers]


def put_back(weights: Weights) -> None:
    """Give layers the weights again that they had."""
    for layer, tensors in weights:
        give(layer, **tensors)


def layers_of(module: nn.Module) -> dict[str, SitedLinear]:
    """All Linear layers of `module` that have sites, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, SitedLinear)}


def find_folds(module: nn.Module, images: Tensor) -> list[Fold]:
    """The folds of `module`, in the model's order; each one is proved on `images`, (N, C, H, W)."""
    before = outputs_of(module, images)
    candidates = holding(
        [_norms(module, images), _values(module)], lambda folds: _proved(module, images, before, folds)
    )
    order = list(layers_of(module).values())
    return sorted(candidates, key=lambda fold: order.index(fold.readers[0]))


def holding(kinds: Sequence[Sequence[Place]], proved: Callable[[Sequence[Place]], bool]) -> list[Place]:
    """Those of the places of several kinds that `proved` says hold.

    It is asked about all together, where they don't about each kind, and then about each place; about each that holds
    it has said so just once.
    """
    kinds = [kind for kind in kinds if kind]
    together = [place for kind in kinds for place in kind]
    if not together or proved(together):
        return together
    if len(together) == 1:
        return []
    parts = kinds if len(kinds) > 1 else [[place] for place in together]
    return [place for part in parts for place in holding([part], proved)]


def outputs_of(module: nn.Module, images: Tensor) -> Tensor:
    """What `module` puts out for `images`, all outputs side by side, (N, numbers)."""
    with torch.inference_mode():
        found = module(images)
        return torch.cat([part.flatten(1) for part in ([found] if isinstance(found, Tensor) else found)], 1)


def moved(before: Tensor, after: Tensor) -> float:
    """How far outputs have moved, relative to the largest of those before; to be held against `UNCHANGED`."""
    return float((after - before).abs().amax() / before.abs().amax())


def _norms(module: nn.Module, images: Tensor) -> list[Fold]:
    """LayerNorms and the layers that read the tokens which they put out, in whatever order."""
    names = {layer: name for name, layer in layers_of(module).items()}
    last: list[tuple[nn.LayerNorm, Tensor]] = []
    readers: dict[nn.LayerNorm, list[SitedLinear]] = {}

    def watch_norm(norm: nn.LayerNorm, _inputs: object, output: Tensor) -> None:
        last[:] = [(norm, output)]

    def watch_layer(layer: SitedLinear, inputs: tuple[Tensor, ...]) -> None:
        if last and _same_tokens(last[0][1], inputs[0]):
            readers.setdefault(last[0][0], []).append(layer)

    hooks = [
        layer.register_forward_hook(watch_norm)
        for layer in module.modules()
        if isinstance(layer, nn.LayerNorm) and layer.bias is not None
    ]
    hooks += [layer.register_forward_pre_hook(watch_layer) for layer in names]
    try:
        outputs_of(module, images)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        Fold(names[found[0]], slice(None), norm, tuple(found))
        for norm, found in readers.items()
        if all(layer.bias is not None for layer in found)
    ]


def _values(module: nn.Module) -> list[Fold]:
    """Attentions in which one layer, `qkv`, makes Q, K and V of one width, and `proj` reads what becomes of V."""
    found = []
    for name, attention in module.named_modules():
        qkv, proj = getattr(attention, "qkv", None), getattr(attention, "proj", None)
        if not (isinstance(qkv, SitedLinear) and isinstance(proj, SitedLinear)):
            continue
        if qkv.bias is not None and proj.bias is not None and qkv.out_features == 3 * proj.in_features:
            found.append(Fold(f"{name}.proj", slice(2 * proj.in_features, None), qkv, (proj,)))
    return found


def _same_tokens(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same tokens, perhaps in another order."""
    if one.shape[-1] != other.shape[-1] or one.numel() != other.numel():
        return False
    sums = [tokens.flatten(0, -2).double().sum(0) for tokens in (one, other)]
    return torch.allclose(sums[0], sums[1], rtol=1e-6, atol=1e-6 * float(one.abs().sum() / one.shape[-1]))


def _proved(module: nn.Module, images: Tensor, before: Tensor, folds: Sequence[Fold]) -> bool:
    """Whether random factors and offsets at `folds` leave the outputs as they were; weights are put back."""
    kept = weights_at(folds)
    generator = torch.Generator().manual_seed(0)
    for fold in folds:
        width = fold.readers[0].in_features
        fold.divide(0.5 + torch.rand(width, generator=generator))
        fold.lower(torch.rand(width, generator=generator))
    same = moved(before, outputs_of(module, images)) < UNCHANGED
    put_back(kept)
    return same
