"""ONNX Runtime's own quantizers: static, dynamic, and INT4 weights for MatMulNBits."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)
from peer import Job, measure
from prepare import prepared

_BLOCK = 32
_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}


class _Reader(CalibrationDataReader):
    """The images, one per call, as ONNX Runtime asks for them."""

    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self._left: Iterator[dict[str, np.ndarray]] = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def attention_matmuls(model: onnx.ModelProto) -> list[str]:
    """Names of the MatMuls between two activations."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] not in constants]


def quantize(job: Job) -> None:
    """`default`, `minmax`, `percentile`, `entropy` (static), `dynamic`, `rtn` or `hqq` (INT4 weights)."""
    with prepared(job) as model:
        if job.option == "default":
            quantize_static(model, job.out, _Reader(job.batches()))
        elif job.option == "dynamic":
            quantize_dynamic(model, job.out)
        elif job.option in ("rtn", "hqq"):
            _weights_only(job, model)
        else:
            quantize_static(
                model,
                job.out,
                _Reader(job.batches()),
                op_types_to_quantize=["MatMul", "Gemm", "Conv"],
                per_channel=True,
                nodes_to_exclude=attention_matmuls(onnx.load(model)),
                calibrate_method=_METHODS[job.option],
            )


def _weights_only(job: Job, model: Path) -> None:
    if job.option == "rtn":
        config = DefaultWeightOnlyQuantConfig(block_size=_BLOCK, is_symmetric=True, quant_format=QuantFormat.QOperator)
    else:
        config = HQQWeightOnlyQuantConfig(block_size=_BLOCK, bits=4)
    quantizer = MatMulNBitsQuantizer(onnx.load(model), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(job.out))


if __name__ == "__main__":
    measure(quantize, ("onnxruntime", "onnx"))
