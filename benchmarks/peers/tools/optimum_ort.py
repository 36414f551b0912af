"""Optimum's front end to ONNX Runtime's quantizer, configured for AVX512-VNNI as its documentation shows."""

import shutil

from onnxruntime.quantization import CalibrationMethod
from optimum.onnxruntime import ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig, CalibrationConfig
from peer import Job, measure


def quantize(job: Job) -> None:
    """`static`, with minimum and maximum over the images, or `dynamic`."""
    quantizer = ORTQuantizer.from_pretrained(job.float_onnx.parent, file_name=job.float_onnx.name)
    static = job.option == "static"
    config = AutoQuantizationConfig.avx512_vnni(is_static=static, per_channel=True)
    folder = job.out.with_name("optimum")
    folder.mkdir(exist_ok=True)
    ranges = None
    if static:
        images = [{"images": batch["images"][0]} for batch in job.batches()]  # it makes batches of its own
        calibration = CalibrationConfig("images", "", "", len(images), CalibrationMethod.MinMax)
        augmented = folder / "augmented"
        ranges = quantizer.fit(images, calibration, augmented, operators_to_quantize=config.operators_to_quantize)
    quantizer.quantize(config, folder, file_suffix="quantized", calibration_tensors_range=ranges)
    (folder / f"{job.float_onnx.stem}_quantized.onnx").replace(job.out)
    shutil.rmtree(folder)


if __name__ == "__main__":
    measure(quantize, ("optimum-onnx", "onnxruntime", "onnx"))
