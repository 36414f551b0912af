"""Optimum's front end to ONNX Runtime's quantizer, configured for AVX512-VNNI as its documentation shows."""

import shutil

from onnxruntime.quantization import CalibrationMethod
from optimum.onnxruntime import ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig, CalibrationConfig
from peer import Job, measure
from prepare import prepared


def quantize(job: Job) -> None:
    """`static`, with minimum and maximum over the images, or `dynamic`."""
    static = job.option == "static"
    config = AutoQuantizationConfig.avx512_vnni(is_static=static, per_channel=True)
    with prepared(job) as model:
        quantizer = ORTQuantizer.from_pretrained(model.parent, file_name=model.name)
        ranges = None
        if static:
            images = [{"images": batch["images"][0]} for batch in job.batches()]  # it makes batches of its own
            calibration = CalibrationConfig("images", "", "", len(images), CalibrationMethod.MinMax)
            augmented = model.with_name("augmented.onnx")
            ranges = quantizer.fit(images, calibration, augmented, operators_to_quantize=config.operators_to_quantize)
        quantizer.quantize(config, model.parent, file_suffix="quantized", calibration_tensors_range=ranges)
        shutil.move(model.with_name("float_quantized.onnx"), job.out)


if __name__ == "__main__":
    measure(quantize, ("optimum-onnx", "onnxruntime", "onnx"))
