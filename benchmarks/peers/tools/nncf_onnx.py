"""NNCF's post-training quantization of an ONNX file, and its INT4 compression of weights."""

import nncf
import onnx
from onnx import version_converter
from peer import Job, measure

_BLOCK = 32
_INT4_OPSET = 21  # below it, NNCF 3.4 puts the bias into MatMulNBits and keeps the Add: it counts twice


def quantize(job: Job) -> None:
    """`transformer` (INT8, the preset for transformers, all images) or `int4_sym` (weights alone)."""
    model = onnx.load(job.float_onnx)
    if job.option == "transformer":
        images = job.batches()
        found = nncf.quantize(
            model, nncf.Dataset(images), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images)
        )
    else:
        mode = nncf.CompressWeightsMode(job.option)
        model = version_converter.convert_version(model, _INT4_OPSET)
        spared = nncf.IgnoredScope(types=["Conv"])  # its blocks of a convolution are what ONNX Runtime cannot load
        found = nncf.compress_weights(model, mode=mode, group_size=_BLOCK, ignored_scope=spared)
    onnx.save(found, job.out)


if __name__ == "__main__":
    measure(quantize, ("nncf", "onnxruntime", "onnx"))
