"""Layers better left in float, and massive activations, found with no data.

Massive activations: some vision transformers write a few values into a few tokens that are tens of times larger than
all others. A scale that holds them leaves the rest hardly any codes, and one that does not cuts off what the model
relies on. They do not depend on what the image shows, so noise finds them. Constant inputs: a layer that computes a
position embedding reads the same values whatever the image, and run-times keep it in float.

Source: Sun et al., "Massive Activations in Large Language Models", arXiv 2402.17762, describe them, vision transformers
included. The measure and its limit are ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibrators.scheme import QuantScheme
from calibrators.sites import SitedConv2d, SitedLinear
from dfq_deploy.models import Model

__all__ = ["Massive", "layers_to_spare", "massive_activations"]

_IMAGES = 4
_BULK = 0.9999  # of a layer's input values; the rest are the outliers
_STREAM_BULK = 0.999  # of the residual stream's: four such tokens, as ViT-Ti has them, are 0.01 % of its 192 channels
_LIMIT = 16.0  # largest value over the bulk's: from here on, INT8 leaves the bulk fewer than 8 codes on either side
_NAMED = 3  # channels named in a text


@dataclass(frozen=True)
class Massive:
    """Massive activations in the input of one module.

    Attributes:
        place: The module's name.
        stream: Whether it is a LayerNorm, which reads the residual stream, and not a layer that may be quantized.
        channels: The largest size in each channel that has them, largest first.
        tokens: How many tokens have them.
        of: Among how many.
        share: What share of all values the bulk is.
        bulk: What the bulk stays below.
    """

    place: str
    stream: bool
    channels: Mapping[int, float]
    tokens: int
    of: int
    share: float
    bulk: float

    @property
    def largest(self) -> float:
        """The largest size of all."""
        return max(self.channels.values())

    def report(self) -> dict[str, Any]:
        """The finding as JSON."""
        channels = [{"channel": channel, "largest": largest} for channel, largest in self.channels.items()]
        return {**asdict(self), "largest": self.largest, "channels": channels}

    def __str__(self) -> str:
        named = ", ".join(map(str, list(self.channels)[:_NAMED]))
        more = f" and {len(self.channels) - _NAMED} more" if len(self.channels) > _NAMED else ""
        channels = f"{'channel' if len(self.channels) == 1 else 'channels'} {named}{more}"
        return (
            f"reaches {self.largest:.0f} ({channels}, in {self.tokens} of {self.of} tokens) "
            f"while {100 * self.share:g}% of it stays below {self.bulk:.2g}"
        )


def layers_to_spare(model: Model, scheme: QuantScheme, *, first_layer: bool, measured: bool = False) -> dict[str, str]:
    """The layers that quantization serves badly, with the reason.

    The ends of the model, and what noise shows. Where activations stay float there are none; floating-point codes
    hold massive activations well. What is simulated only is quantized whole, but for constants.

    Args:
        model: The model.
        scheme: The wanted number formats.
        first_layer: Quantize the layer that reads the image all the same.
        measured: Leave out what a measurement will judge: massive activations and the classifier.
    """
    if scheme.activation is None:
        return {}
    found: dict[str, str] = {}
    constant = _constant(model)

    def look(name: str, layer: nn.Module, values: Tensor) -> None:
        if len(values) == 1:  # of a batch of _IMAGES
            constant.add(name)
        elif massive := _massive(name, layer, values):
            found[name] = f"its input {massive}"

    _show_noise(model, (SitedLinear, SitedConv2d), look)
    if measured or scheme.simulated or scheme.activation.mantissa is not None:
        found.clear()
    found |= dict.fromkeys(constant, "its input does not depend on the image")
    if scheme.simulated:
        return found
    if not measured:
        found |= dict.fromkeys(model.classifiers, "it puts out the logits: its error counts in full, its time hardly")
    if not first_layer and model.first:
        found[model.first] = "it reads the image: its error reaches every layer, its time hardly counts"
    return found


def massive_activations(model: Model) -> list[Massive]:
    """Massive activations in what layers read, and in the residual stream as LayerNorms read it, in the model's order.

    A residual stream that has them costs nothing as long as additions and LayerNorms stay float.
    """
    found: list[Massive] = []

    def look(name: str, module: nn.Module, values: Tensor) -> None:
        if massive := _massive(name, module, values):
            found.append(massive)

    _show_noise(model, (SitedLinear, SitedConv2d, nn.LayerNorm), look)
    return found


def _constant(model: Model) -> set[str]:
    """The layers that read the same of two images."""
    sums: list[dict[str, tuple[float, float]]] = [{}, {}]
    for seed, read in enumerate(sums):

        def add_up(name: str, _layer: nn.Module, values: Tensor, read: dict[str, tuple[float, float]] = read) -> None:
            read[name] = float(values.double().sum()), float(values.double().square().sum())

        _show_noise(model, (SitedLinear, SitedConv2d), add_up, images=1, seed=seed)
    return {name for name, first in sums[0].items() if first == sums[1][name]}


def _show_noise(
    model: Model,
    kinds: tuple[type[nn.Module], ...],
    look: Callable[[str, nn.Module, Tensor], None],
    *,
    images: int = _IMAGES,
    seed: int = 0,
) -> None:
    """Pass noise images through `model` and show `look` each module of these kinds: name, module, input."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: look(name, module, inputs[0])

    modules = [(name, module) for name, module in model.module.named_modules() if isinstance(module, kinds)]
    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in modules]
    low, high = map(torch.from_numpy, model.preprocess.bounds)
    noise = torch.randn(images, *model.preprocess.shape, generator=torch.Generator().manual_seed(seed))
    try:
        with torch.inference_mode():
            model.module(noise.clamp(low, high))
    finally:
        for handle in hooks:
            handle.remove()


def _massive(name: str, module: nn.Module, values: Tensor) -> Massive | None:
    """The massive activations in `values`, the input of `module`; None if there are none."""
    stream = isinstance(module, nn.LayerNorm)
    norm_of_maps = isinstance(module, nn.LayerNorm) and values.shape[-1] != module.normalized_shape[-1]
    axis = 1 if norm_of_maps or isinstance(module, nn.Conv2d) else -1
    sizes = values.float().abs()
    share = _STREAM_BULK if stream else _BULK
    rank = max(1, int(share * sizes.numel()))
    if int((sizes < sizes.max() / _LIMIT).sum()) < rank:  # counted sooner than ranked
        return None
    bulk = float(sizes.flatten().kthvalue(rank).values)
    if bulk <= 0:
        return None
    sizes = sizes.movedim(axis, -1).reshape(-1, values.shape[axis])  # (tokens, channels)
    huge = sizes > _LIMIT * bulk
    largest = sizes.amax(0)
    channels = sorted(huge.any(0).nonzero().flatten().tolist(), key=lambda channel: -largest[channel])
    return Massive(
        place=name,
        stream=stream,
        channels={channel: float(largest[channel]) for channel in channels},
        tokens=int(huge.any(1).sum()),
        of=len(sizes),
        share=share,
        bulk=bulk,
    )
