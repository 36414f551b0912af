"""Layers better left in float, found with no data.

Massive activations: some vision transformers write a few values into a few tokens that are tens of times larger than
all others. A scale that holds them leaves the rest hardly any codes, and one that does not cuts off what the model
relies on. They do not depend on what the image shows, so noise finds them. Constant inputs: a layer that computes a
position embedding reads the same values whatever the image, and run-times keep it in float.

Source: Sun et al., "Massive Activations in Large Language Models", arXiv 2402.17762, describe them, vision transformers
included. The measure and its limit are ours.
"""

import functools

import torch
from torch import Tensor, nn

from calibrators.plan import layer_of
from calibrators.scheme import QuantScheme
from calibrators.sites import SitedConv2d, SitedLinear, sites_of
from dfq_deploy.models import Model

__all__ = ["layers_to_spare"]

_IMAGES = 4
_BULK = 0.9999  # of a layer's input values; the rest are the outliers
_LIMIT = 16.0  # largest value over the bulk's: from here on, INT8 leaves the bulk fewer than 8 codes on either side

_CONSTANT = "its input does not depend on the image"


def layers_to_spare(model: Model, scheme: QuantScheme, *, first_layer: bool) -> dict[str, str]:
    """The layers that quantization serves badly, with the reason.

    The ends of the model, and what noise shows. Where activations stay float there are none; floating-point codes
    hold massive activations well.

    Args:
        model: The model.
        scheme: The wanted number formats.
        first_layer: Quantize the layer that reads the image all the same.
    """
    if scheme.activation is None:
        return {}
    found: dict[str, str] = {}
    hooks = [
        layer.register_forward_pre_hook(functools.partial(_look, found, name))
        for name, layer in model.module.named_modules()
        if isinstance(layer, SitedLinear | SitedConv2d)
    ]
    low, high = map(torch.from_numpy, model.preprocess.bounds)
    noise = torch.randn(_IMAGES, *model.preprocess.shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            model.module(noise.clamp(low, high))
    finally:
        for hook in hooks:
            hook.remove()
    if scheme.activation.mantissa is not None:
        found = {layer: reason for layer, reason in found.items() if reason == _CONSTANT}
    found |= dict.fromkeys(model.classifiers, "it puts out the logits: its error counts in full, its time hardly")
    first = next(iter(sites_of(model.module)))
    if not first_layer:
        found[layer_of(first)] = "it reads the image: its error reaches every layer, its time hardly counts"
    return found


def _look(found: dict[str, str], name: str, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    sizes = inputs[0].float().abs().flatten()
    largest = float(sizes.amax())
    bulk = float(sizes.kthvalue(max(1, int(_BULK * sizes.numel()))).values)
    if len(inputs[0]) == 1:  # of a batch of _IMAGES
        found[name] = _CONSTANT
    elif largest > _LIMIT * bulk > 0:
        found[name] = f"its input reaches {largest:.0f} while {_BULK:.2%} of it stays below {bulk:.2g}"
