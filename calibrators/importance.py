"""Which tokens matter: how far an error in what a layer puts out moves what the whole model puts out.

A correction makes a layer's error small, which is a stand-in for the model's. The two part where tokens differ: after
the last block of a classifier only the class token is read, and what a token with massive activations is given is
normalised away.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from calibrators.folds import layers_of

__all__ = ["token_importance"]

_AT_ONCE = 2  # images, whose activations are all in memory
_SEED = 0


def token_importance(module: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """What a squared error in a token counts, for each Linear that is reached, relative to the mean of its tokens.

    Args:
        module: The model, with weights that take no gradient.
        pixels: Images (N, C, H, W).

    Returns:
        By the layer's name (tokens,) float32, image after image, with mean 1. A layer of which no gradient can be had
        is left out.

    Source: ours. A token's weight is the mean over channels of (J'v)², J the model's Jacobian from the layer's output
    to what it puts out, v random signs; its expectation is what a small error there, alike in all channels, adds to
    the squared error of the outputs. PTQ4ViT (arXiv 2111.12293, sec. 3.3) has squared gradients of a loss instead.
    """
    generator = torch.Generator().manual_seed(_SEED)
    found: dict[str, list[Tensor]] = {}
    for images in torch.split(pixels, _AT_ONCE):
        with torch.enable_grad(), _put_out(layers_of(module)) as outputs:
            whole = module(images.clone().requires_grad_())
        for name, gradient in _gradients(whole, outputs, generator).items():
            found.setdefault(name, []).append(gradient.float().square().mean(-1).flatten())
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    return {name: of / of.mean() for name, of in joined.items() if of.isfinite().all() and of.any()}


def _gradients(
    whole: Tensor | tuple[Tensor, ...], outputs: Mapping[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """Gradients of `whole`, with random signs and added up, in the outputs of layers."""
    parts = [part for part in ([whole] if isinstance(whole, Tensor) else whole) if part.requires_grad]
    names = [name for name, output in outputs.items() if output.requires_grad]
    if not parts or not names:
        return {}
    signs = [torch.randint(2, part.shape, generator=generator) * 2.0 - 1 for part in parts]
    gradients = torch.autograd.grad(parts, [outputs[name] for name in names], signs, allow_unused=True)
    return {name: found for name, found in zip(names, gradients, strict=True) if found is not None}


@contextlib.contextmanager
def _put_out(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What each layer puts out when it is called for the first time within the block."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _layer: nn.Module, _inputs: object, output: Tensor) -> None:
        outputs.setdefault(name, output)

    hooks = [layer.register_forward_hook(functools.partial(keep, name)) for name, layer in layers.items()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
