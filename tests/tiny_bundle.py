"""A bundle of a model with one matrix, made in milliseconds and without torch: what tests of readers damage."""

from pathlib import Path

import numpy as np
import onnx.parser
from onnx import numpy_helper

from calibrators.affine import CODES
from calibrators.plan import QParams, QuantPlan
from calibrators.preprocess import Preprocess
from exporters.backends import BuildOptions
from exporters.bundle import EngineFacts, Manifest, ModelFacts, seal_bundle

__all__ = ["PREPROCESS", "sealed", "tiny_bundle", "tiny_model", "tiny_plan"]

PREPROCESS = Preprocess((4, 4), 1.0, "center", "bicubic", (0.5,), (0.5,))
_TEXT = """<ir_version: 10, opset_import: ["": 20]>
agraph (float[N, 1, 4, 4] images) => (float[N, 3] logits) {
    flat = Flatten (images)
    logits = MatMul (flat, head)
}"""


def tiny_model() -> onnx.ModelProto:
    """The model."""
    model = onnx.parser.parse_model(_TEXT)
    weights = numpy_helper.from_array(np.arange(48, dtype=np.float32).reshape(16, 3) / 48, "head")
    model.graph.initializer.append(weights)
    return model


def tiny_plan() -> QuantPlan:
    """A plan of one layer, with a site of each shape."""
    scale = np.float32([0.5, 0.25, 0.125])
    sites = {
        "head.input": QParams(np.array(0.5, np.float32), np.array(0, np.int8), CODES["int8"], None),
        "head.weight": QParams(scale, np.zeros(3, np.int8), CODES["int8"], 0),
    }
    return QuantPlan(sites, {"stem.input": "asked for"}, "w8a8", "m" * 64, "i" * 64)


def tiny_bundle(folder: Path) -> Path:
    """Write the bundle to `folder`."""
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(tiny_model().SerializeToString(deterministic=True))
    tiny_plan().save(folder / "plan.safetensors")
    (folder / "classes.txt").write_text("nought\none\ntwo\n")
    return sealed(folder, ["model.onnx", "plan.safetensors", "classes.txt"])


def sealed(folder: Path, files: list[str]) -> Path:
    """`folder` with a manifest that names `files`."""
    built = EngineFacts(
        state="built",
        options=BuildOptions(provider="cpu"),
        files=[],
        made_for={"onnxruntime": "1.32.0"},
        precision={"head": "int8"},
        reasons={},
        kernels={},
        note="",
    )
    manifest = Manifest(
        model=ModelFacts(name="tiny", checkpoint=None, random_weights=True, seed=0, fingerprint="f" * 64, classes=3),
        preprocess=PREPROCESS,
        backend="ort",
        scheme="w8a8",
        recipe={"model": "tiny", "calib": "synthetic", "block": 64},
        images={"source": "synthetic:noise", "fingerprint": "i" * 64},
        float_parity=1e-7,
        engine=built,
        versions={"dfq-deploy": "0.1.0"},
        files={},
    )
    seal_bundle(folder, manifest, files)
    return folder
