"""A torch model to an ONNX graph as torch's exporter makes it, and what has to be done around that exporter.

It fixes what `len` of a tensor says, knows no fused attention of three dimensions, loses some constants, narrates, and
has no base class for its errors.
"""

import contextlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import onnx_ir as ir
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from calibrators.errors import ExportError
from calibrators.sites import Mode, set_mode

__all__ = ["OPSET", "cannot_export", "parameters_in_use", "traced"]

# ORT 1.27 to 1.31 cannot load S8 Q/DQ with a quantized Conv at opset 21 (FACTS.md).
OPSET = 20
# How torch names the line of a module that its exporter cannot follow.
_RAISED_BY = re.compile(
    r'following call raised this error:\n\s*File "(?P<file>[^"]+)", line (?P<line>\d+).*\n(?P<code>.+)'
)


def traced(module: nn.Module, example: torch.Tensor, outputs: Sequence[str]) -> ir.Model:
    """The graph of `module`, its sites marked, with input `images` (N, C, H, W) and the outputs named, N free.

    Raises:
        ExportError: torch's exporter cannot express the model, with its reason.
    """
    set_mode(module, Mode.MARK)
    try:
        with _quiet_exporter(), _any_length(module), _AttentionIn4D():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                input_names=["images"],
                output_names=list(outputs),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as cause:
        innermost: BaseException = cause
        while innermost.__cause__ is not None:
            innermost = innermost.__cause__
        raise cannot_export(innermost) from cause
    finally:
        set_mode(module, Mode.OFF)
    assert program is not None
    _keep_constants(program.model)
    return program.model


def parameters_in_use(module: nn.Module, example: torch.Tensor) -> set[str]:
    """Names of the parameters and buffers that what `module` puts out depends on, as an exported model will have them.

    Raises:
        ExportError: torch cannot trace it with any number of images, with the exporter's reason.
    """
    batch = {0: torch.export.Dim("batch")}
    try:
        with _quiet_exporter(), _any_length(module), torch.no_grad():
            program = torch.export.export(module, (example,), dynamic_shapes=(batch,), strict=False)
            program = program.run_decompositions({})  # without operations in place, which count as used
    except Exception as cause:  # the exporter's errors have no common base class
        raise cannot_export(cause) from cause
    graph, signature = program.graph_module.graph, program.graph_signature
    graph.eliminate_dead_code()
    inputs = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {inputs[node.name] for node in graph.find_nodes(op="placeholder") if node.users and node.name in inputs}


def cannot_export(cause: BaseException) -> ExportError:
    """What to raise for an exporter's error: its reason, and the line of the module where it names one."""
    told = str(cause)
    line = _RAISED_BY.search(told)
    where = f" ({line['file']}:{line['line']}: {line['code'].strip()})" if line else ""
    return ExportError(
        what="torch cannot export this model to ONNX.",
        why=(" ".join(told.split()) or type(cause).__name__)[: 200 if where else 300] + where,
        fix="take what depends on the values of tensors, or on the number of images, out of its forward (torch.where "
        "in place of if), wrap the part without it, or pick another variant of the model.",
    )


class _AttentionIn4D(TorchFunctionMode):
    """Gives fused attention of three dimensions a fourth: torch's exporter expresses no other."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        called = _attention_in_4d if function is F.scaled_dot_product_attention else function
        return called(*args, **(kwargs or {}))


def _attention_in_4d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *rest: Any,
    **more: Any,
) -> torch.Tensor:
    if query.ndim != 3:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *rest, **more)
    if attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = attn_mask.unsqueeze(1)
    query, key, value = (part.unsqueeze(1) for part in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask, *rest, **more).squeeze(1)


def _keep_constants(model: ir.Model) -> None:
    """Make initializers of constants that the exporter only holds in memory, as it does of some Clip's bounds.

    Some versions of it call two of them by one name.
    """
    kept = model.graph.initializers
    for node in model.graph:
        for value in node.inputs:
            if value is None or value.const_value is None or value.producer() is not None:
                continue
            if kept.get(str(value.name), value) is not value:
                value.name = f"{value.name}.{node.name}"
            kept[str(value.name)] = value


@contextlib.contextmanager
def _any_length(module: nn.Module) -> Iterator[None]:
    """Let `len` of a tensor follow the number of images, in the files of `module`'s parts: Python's own fixes it."""
    names = {type(part).__module__ for part in module.modules()}
    files = [sys.modules[name] for name in sorted(names) if name in sys.modules]
    with contextlib.ExitStack() as patched:
        for file in files:
            if not hasattr(file, "len"):
                patched.enter_context(mock.patch.object(file, "len", _length, create=True))
        yield


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, torch.Tensor) else len(value)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep torch's exporter from narrating: what matters comes as an exception."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    nowhere = io.StringIO()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
