"""A model of three operators, as a real engine of whatever TensorRT is installed; built without a GPU by RTX."""

from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx.parser

from exporters.tensorrt.log import Recorder, recorder

CLASSES = 5
IMAGE = (3, 4, 4)
_WEIGHT = np.random.default_rng(0).normal(size=(int(np.prod(IMAGE)), CLASSES)).astype(np.float32)
_TEXT = """
<ir_version: 9, opset_import: ["": 20]>
tiny (float[batch, 3, 4, 4] images) => (float[batch, 5] logits)
{
    flat = Flatten(images)
    sums = MatMul(flat, weight)
    logits = Relu(sums)
}
"""


def tiny_images(n: int) -> np.ndarray:
    """`n` images, other ones for every n."""
    return np.random.default_rng(n).normal(size=(n, *IMAGE)).astype(np.float32)


def tiny_logits(images: np.ndarray) -> np.ndarray:
    """What the engine should answer."""
    return np.maximum(images.reshape(len(images), _WEIGHT.shape[0]) @ _WEIGHT, 0)


def build_tiny(
    trt: ModuleType, folder: Path, batch: tuple[int, int, int], *, target: str = ""
) -> tuple[Path, Recorder]:
    """The engine file, and what the builder said; `target` (`SM89`), which RTX alone takes, is this GPU if empty."""
    model = onnx.parser.parse_model(_TEXT)
    model.graph.initializer.append(onnx.numpy_helper.from_array(_WEIGHT, "weight"))
    log = recorder(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, log).parse(model.SerializeToString()), log.errors()
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    profile.set_shape("images", *[(n, *IMAGE) for n in batch])
    config.add_optimization_profile(profile)
    if target:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None, log.errors()
    path = folder / "tiny.engine"
    path.write_bytes(engine)
    return path, log
