"""Attention in models that are not timm's, found by watching: which Linear softmax·V goes into, and in what form.

transformers and hand-written models call their projections what they like. What they compute is the same: a fused
attention, or a softmax over (rows, heads, tokens, keys), and then a Linear over as many tokens. Whatever lies in a
decoder, whose tokens are no patches, is left out.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["SOFTMAX", "Attention", "attentions_of", "has_class_token", "owner_of", "prefix_of"]

SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)
"""What is called where attention is not fused."""
_CLASS = ("cls_token", "class_embedding")
_FIRST = (*_CLASS, "dist_token", "distillation_token", "register_tokens", "reg_token")


@dataclass(frozen=True)
class Attention:
    """One attention.

    Attributes:
        projection: Name of the Linear that softmax·V goes into.
        module: Name of the module that computes the softmax.
        heads: Number of heads.
        rows: Images times windows.
        tokens: Tokens that attend to others.
    """

    projection: str
    module: str
    heads: int
    rows: int
    tokens: int


def attentions_of(module: nn.Module, images: Tensor) -> list[Attention]:
    """The attentions that a pass of `images` shows, in its order."""
    watch = _Watch()
    with contextlib.ExitStack() as exits:
        for name, part in module.named_modules():
            for handle in (
                part.register_forward_pre_hook(lambda part, inputs, name=name: watch.enter(name, part, inputs)),
                part.register_forward_hook(lambda *_: watch.leave(), always_call=True),
            ):
                exits.callback(handle.remove)
        exits.enter_context(watch)
        module(images)
    return [found for found in watch.found if "decoder" not in found.projection]


def owner_of(module: nn.Module, attention: str) -> nn.Module:
    """The part of `module` that puts tokens in front of the patches which `attention`, by name, sees.

    It is the nearest one around it that says how many, as timm's models do, else that has parameters for them; all of
    `module` where none has.
    """
    names = attention.split(".")
    around = [module.get_submodule(".".join(names[:depth])) for depth in reversed(range(len(names)))]
    says = [part for part in around if hasattr(part, "num_prefix_tokens")]
    return (says or [part for part in around if prefix_of(part)] or [module])[0]


def prefix_of(module: nn.Module) -> int:
    """How many tokens `module` puts in front of the patches: what it says, else those that it has parameters for."""
    parameters = ((name.rpartition(".")[2], value) for name, value in module.named_parameters())
    counted = sum(value.shape[-2] if value.ndim > 1 else 1 for name, value in parameters if name in _FIRST)
    return int(getattr(module, "num_prefix_tokens", counted))


def has_class_token(module: nn.Module) -> bool:
    """Whether a class token is among the tokens that `module` puts in front of the patches; it is the first then."""
    return any(name.rpartition(".")[2] in _CLASS for name, _ in module.named_parameters())


class _Watch(TorchFunctionMode):
    """Remembers the last attention until a Linear takes up what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Attention] = []
        self._inside: list[str] = []
        self._pending: Attention | None = None

    def enter(self, name: str, part: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._inside.append(name)
        if not isinstance(part, nn.Linear) or self._pending is None:
            return
        seen, self._pending = self._pending, None
        if not inputs:  # called by keyword, its input cannot be captured
            return
        shape = inputs[0].shape
        if shape[:-1].numel() == seen.rows * seen.tokens and shape[-1] % seen.heads == 0:
            self.found.append(Attention(name, seen.module, seen.heads, seen.rows, seen.tokens))

    def leave(self) -> None:
        self._inside.pop()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if (function is F.scaled_dot_product_attention or function in SOFTMAX) and result.ndim == 4:
            rows, heads, tokens, _ = result.shape
            self._pending = Attention("", self._inside[-1], heads, rows, tokens)
        return result
