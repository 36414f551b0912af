"""NVIDIA ModelOpt's post-training quantization of an ONNX file.

What it does not quantize stays fp32 here: its default is fp16, which ONNX Runtime's CPU kernels compute slowly. Without
images it draws one random input by itself.
"""

import numpy as np
import onnx
from modelopt.onnx.quantization import quantize as modelopt_quantize
from peer import Job, measure

_BLOCK = 32


def quantize(job: Job) -> None:
    """`int8` or `int4`, each by its default method: entropy and AWQ-clip."""
    int4 = job.option == "int4"
    images = None if job.images is None else np.load(job.images)
    modelopt_quantize(
        str(job.float_onnx),
        quantize_mode=job.option,
        calibration_data=images,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        block_size=_BLOCK if int4 else None,
        nodes_to_exclude=_gemms(job) if int4 else None,
        output_path=str(job.out),
    )


def _gemms(job: Job) -> list[str]:
    """The head: of a Gemm with a transposed weight it makes blocks along the wrong axis."""
    graph = onnx.load(job.float_onnx).graph
    return [node.name for node in graph.node if node.op_type == "Gemm"]


if __name__ == "__main__":
    measure(quantize, ("nvidia-modelopt", "onnxruntime-gpu", "onnx"))
