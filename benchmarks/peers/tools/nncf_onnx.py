"""NNCF's post-training quantization of an ONNX file, and its INT4 compression of weights."""

import nncf
import onnx
from peer import Job, measure

_BLOCK = 32


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
        found = nncf.compress_weights(model, mode=mode, group_size=_BLOCK, ratio=1.0)
    onnx.save(found, job.out)


if __name__ == "__main__":
    measure(quantize, ("nncf", "onnxruntime", "onnx"))
