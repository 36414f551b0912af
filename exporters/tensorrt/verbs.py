"""The verb of a backend that TensorRT and TensorRT for RTX answer alike, and what both want quantized."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import onnx_ir as ir

from calibrators.plan import QuantPlan
from exporters.backends import BuildOptions, Placement
from exporters.tensorrt.fence import put_fences
from exporters.tensorrt.refusals import cannot_time_layers

__all__ = ["prepare", "time_layers", "wanted"]


def wanted(blocks: tuple[int, ...]) -> Placement:
    """A convolution is fused without its output; next to INT8 matmuls a float one would cost time on a GPU."""
    return Placement(first_layer=True, convolution_outputs=False, noisy_layers=True, blocks=blocks, zero_points=False)


def prepare(model: ir.Model, plan: QuantPlan, options: BuildOptions) -> None:
    """Put fences behind what TensorRT would cut."""
    put_fences(model, plan)


def time_layers(models: Sequence[Path], layers: Iterable[str], options: BuildOptions) -> list[dict[str, float]]:
    """Nothing: TensorRT merges layers with what lies between them.

    Raises:
        BackendError: Always.
    """
    raise cannot_time_layers()
