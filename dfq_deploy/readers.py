"""Convolutions whose output several operators read: ONNX Runtime's CPU kernels compute those in float.

It makes signed codes unsigned before it fuses, but only where one DequantizeLinear reads what a QuantizeLinear writes.
A convolution whose output is left signed by that, and whose input is not, is not fused.
"""

from collections import Counter
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
    """Counts the operators that read each tensor.

    Attributes:
        calls: How many, by the tensor's id; the tensors are kept, so that no id is used twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[int] = Counter()
        self._kept: list[Tensor] = []
        self._same: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it reads."""
        found = func(*args, **(kwargs or {}))
        name = func._schema.name
        read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        self._kept += [*read, *(value for value in tree_leaves(found) if isinstance(value, Tensor))]
        if name in _SAME:
            self._same[id(found)] = self._same.get(id(read[0]), id(read[0]))
        else:
            self.calls.update({self._same.get(id(value), id(value)): 1 + (name in _TWO) for value in read})
        return found


def read_by_several(model: Model) -> dict[str, str]:
    """The sited convolutions of `model` whose output more than one operator reads, with the reason to spare them."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _layer, _inputs, output: outputs.update({name: output})

    convolutions = [(name, layer) for name, layer in model.module.named_modules() if isinstance(layer, SitedConv2d)]
    hooks = [layer.register_forward_hook(keep(name)) for name, layer in convolutions]
    try:
        with torch.no_grad(), _Readers() as readers:
            model.module(torch.zeros(1, *model.preprocess.shape))
    finally:
        for hook in hooks:
            hook.remove()
    reason = "several operators read its output, so that ONNX Runtime would compute it in float"
    return {name: reason for name, output in outputs.items() if readers.calls[id(output)] > 1}
