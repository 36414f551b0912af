"""Convolutions whose output several operators read: ONNX Runtime's CPU kernels compute those in float.

It makes signed codes unsigned before it fuses, but only where one DequantizeLinear reads what a QuantizeLinear writes.
A convolution whose output is left signed by that, and whose input is not, is not fused.
"""

from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from calibrators.sites import SitedConv2d
from dfq_deploy.models import Model

__all__ = ["read_by_several"]

_SAME = {"aten::alias", "aten::clone", "aten::contiguous", "aten::detach", "aten::dropout"}  # not there in ONNX
_TWO = {"aten::silu", "aten::silu_"}  # x * sigmoid(x) in ONNX


class _Readers(TorchDispatchMode):
    """Counts the operators that read each tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: Counter[tuple[int, int]] = Counter()
        self._kept: list[Tensor] = []  # so that no id is used twice
        self._same: dict[tuple[int, int], tuple[int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it reads."""
        read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        before = [self.value(tensor) for tensor in read]
        found = func(*args, **(kwargs or {}))
        name = func._schema.name
        self._kept += [*read, *(value for value in tree_leaves(found) if isinstance(value, Tensor))]
        if name in _SAME:
            self._same[self.value(found)] = before[0]
        else:
            self._calls.update(dict.fromkeys(before, 1 + (name in _TWO)))
        return found

    def value(self, tensor: Tensor) -> tuple[int, int]:
        """What stands for the values that `tensor` has now, before an operator changes them in place."""
        key = id(tensor), 0 if tensor.is_inference() else tensor._version  # what a module keeps may be one
        return self._same.get(key, key)

    def count(self, value: tuple[int, int]) -> int:
        """How many operators read a value."""
        return self._calls[value]


def read_by_several(model: Model) -> dict[str, str]:
    """The sited convolutions of `model` whose output more than one operator reads, with the reason to spare them."""
    outputs: dict[str, tuple[int, int]] = {}
    readers = _Readers()

    def keep(name: str) -> Any:
        return lambda _layer, _inputs, output: outputs.update({name: readers.value(output)})

    with ExitStack() as hooks:
        for name, layer in model.module.named_modules():
            if isinstance(layer, SitedConv2d):
                hooks.callback(layer.register_forward_hook(keep(name)).remove)
        with torch.no_grad(), readers:
            model.module(torch.zeros(1, *model.preprocess.shape))
    reason = "several operators read its output, so that ONNX Runtime would compute it in float"
    return {name: reason for name, output in outputs.items() if readers.count(output) > 1}
