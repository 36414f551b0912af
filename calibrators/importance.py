"""Which tokens matter: how far an error in what a layer puts out moves what the whole model puts out.

A correction makes a layer's error small, which is a stand-in for the model's. The two part where tokens differ: after
the last block of a classifier only the class token is read, and what a token with massive activations is given is
normalised away.
"""

import functools
import warnings
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from calibrators.errors import CalibrationWarning
from calibrators.folds import layers_of

__all__ = ["token_importance", "token_weights"]

_AT_ONCE = 2  # images, whose activations are all in memory
_SEED = 0
_SMALLEST = 1e-6  # of the mean squared output: what is smaller counts as this large


def token_importance(module: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """What a squared error in a token counts, for each Linear that is reached, relative to the mean of its tokens.

    Args:
        module: The model, with weights that take no gradient.
        pixels: Images (N, C, H, W).

    Returns:
        By the layer's name (tokens,) float32, image after image, with mean 1; the tokens are those of its first call.
        A layer of which no gradient can be had is left out; of a model that has none all are, with a warning.

    Source: ours. A token's weight is the mean over channels of (J'v)², J the model's Jacobian from the layer's output
    to what it puts out, v random signs; its expectation is what small errors there, independent and alike in all
    channels, add to the squared error of the outputs. PTQ4ViT (arXiv 2111.12293, sec. 3.3) has squared gradients of a
    loss instead.
    """
    generator = torch.Generator().manual_seed(_SEED)
    try:
        batches = [_squared_gradients(module, images, generator) for images in torch.split(pixels, _AT_ONCE)]
    except RuntimeError as error:  # in-place operations and operators without a backward pass raise it
        reason, *_ = str(error).split("\n")
        warnings.warn(
            f"tokens count by size alone: gradients of this model cannot be had ({reason}).",
            CalibrationWarning,
            stacklevel=2,
        )
        return {}
    always = set.intersection(*map(set, batches))
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0] if name in always}
    return {name: of / of.mean() for name, of in joined.items() if of.isfinite().all() and of.any()}


def token_weights(importance: Tensor | None, wanted: Tensor) -> Tensor:
    """What each token of a layer counts in a correction, (tokens,) float32 with mean 1.

    Half by its importance, half by its relative error: what a layer gives a token is normalised before it is read. The
    former alone would have the last block of a classifier fitted to the few class tokens of a few images.

    Args:
        importance: As `token_importance` has it; None, or of other tokens than these: relative errors alone count.
        wanted: What the float layer puts out, (tokens, outputs).
    """
    size = wanted.square().sum(1)
    relative = size.clamp(min=_SMALLEST * float(size.mean()) or 1.0).reciprocal()
    relative = relative / relative.mean()
    return relative if importance is None or len(importance) != len(wanted) else (relative + importance) / 2


def _squared_gradients(module: nn.Module, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Mean squared gradients of the model's outputs, with random signs and added up, at each layer's tokens."""
    found: dict[str, Tensor] = {}
    seen = set()

    def keep(name: str, gradient: Tensor) -> None:
        found[name] = gradient.float().square().mean(-1).flatten()

    def watch(name: str, _layer: nn.Module, _inputs: object, output: Tensor) -> None:
        if name not in seen and output.requires_grad:
            output.register_hook(functools.partial(keep, name))  # type: ignore[no-untyped-call]
        seen.add(name)

    with torch.enable_grad(), ExitStack() as hooks:
        for name, layer in layers_of(module).items():
            hooks.callback(layer.register_forward_hook(functools.partial(watch, name)).remove)
        start = images.detach().requires_grad_()
        whole = module(start.clone())  # a model may change what it is given
        parts = [part for part in ([whole] if isinstance(whole, Tensor) else whole) if part.requires_grad]
        signs = [torch.randint(2, part.shape, generator=generator) * 2.0 - 1 for part in parts]
        if parts:
            torch.autograd.grad(parts, start, signs, allow_unused=True)
    return found
