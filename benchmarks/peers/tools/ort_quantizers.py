"""ONNX Runtime's own quantizers: static, dynamic, and INT4 weights for MatMulNBits.

The float model first goes through `quant_pre_process`, as ONNX Runtime's documentation asks.
"""

from collections.abc import Iterator

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
from onnxruntime.quantization.shape_inference import quant_pre_process
from peer import Job, measure

_BLOCK = 32


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
    prepared = job.out.with_name("prepared.onnx")
    quant_pre_process(job.float_onnx, prepared)
    if job.option == "default":
        quantize_static(prepared, job.out, _Reader(job.batches()))
    elif job.option == "dynamic":
        quantize_dynamic(prepared, job.out)
    elif job.option in ("rtn", "hqq"):
        _weights_only(job, onnx.load(prepared))
    else:
        methods = {
            "minmax": CalibrationMethod.MinMax,
            "percentile": CalibrationMethod.Percentile,
            "entropy": CalibrationMethod.Entropy,
        }
        quantize_static(
            prepared,
            job.out,
            _Reader(job.batches()),
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            per_channel=True,
            nodes_to_exclude=attention_matmuls(onnx.load(prepared)),
            calibrate_method=methods[job.option],
        )
    prepared.unlink()


def _weights_only(job: Job, model: onnx.ModelProto) -> None:
    if job.option == "rtn":
        config = DefaultWeightOnlyQuantConfig(block_size=_BLOCK, is_symmetric=True, quant_format=QuantFormat.QOperator)
    else:
        config = HQQWeightOnlyQuantConfig(block_size=_BLOCK, bits=4)
    quantizer = MatMulNBitsQuantizer(model, algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(job.out))


if __name__ == "__main__":
    measure(quantize, ("onnxruntime", "onnx"))
