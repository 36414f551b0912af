"""The ONNX Runtime backend: what it computes in, what it refuses, and each layer against its reference."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import dfq_deploy as dfq
from calibrators.affine import CODES
from calibrators.errors import BackendError, ExportError
from calibrators.images import ImageSet
from calibrators.plan import QParams, QuantPlan
from calibrators.sites import rounded
from dfq_deploy.models.loading import load_model
from dfq_deploy.opening import open_images
from dfq_deploy.reference import Reference
from exporters.backends import BuildOptions, ort
from exporters.bundle import EngineFacts, open_bundle
from exporters.cut import LayerCutter

_CPU = BuildOptions(provider="cpu")
_RECIPES = {
    "w8a8": dfq.Recipe(model="demo", generator="noise", count=8, refine="none"),
    "everything": dfq.Recipe(model="demo", generator="noise", count=8, refine="none", attention=True, spare="none"),
    "w8a8_asym": dfq.Recipe(
        model="demo", generator="noise", count=8, refine="none", attention=True, scheme="w8a8_asym"
    ),
    "w8a8_dynamic": dfq.Recipe(model="demo", generator="noise", count=8, refine="none", scheme="w8a8_dynamic"),
}


@pytest.fixture(scope="module", params=list(_RECIPES))
def bundle(request: pytest.FixtureRequest, demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the demo, made from the finished stages of `demo_bundle`."""
    folder = tmp_path_factory.mktemp("ort") / "bundle"
    shutil.copytree(demo_bundle, folder)
    assert dfq.export(_RECIPES[request.param], folder, limit=16).verdict == "pass"
    return folder


def _plan(folder: Path) -> QuantPlan:
    return QuantPlan.load(folder / "plan.safetensors")


def _images(folder: Path) -> np.ndarray:
    (file,) = (folder / "work").glob("images-*.safetensors")
    return ImageSet.load(file).pixels[:2]


def test_every_planned_layer_is_computed_in_integers(bundle: Path) -> None:
    plan = _plan(bundle)
    census = ort.build(bundle / "model.onnx", plan, _CPU).census
    assert {layer for layer, kind in census.precision.items() if kind == "int8"} == set(plan.layers)
    assert census.reasons.keys() == census.precision.keys() - set(plan.layers), "each float layer has its reason"


def test_the_manifest_tells_the_census(bundle: Path) -> None:
    built = ort.build(bundle / "model.onnx", _plan(bundle), _CPU)
    assert (built.state, built.files, built.note) == ("built", (), "")
    assert open_bundle(bundle).engine == EngineFacts.of(built, _CPU)


def test_every_layer_equals_its_reference_on_the_same_input(bundle: Path) -> None:
    plan, cutter = _plan(bundle), LayerCutter(ir.load(bundle / "model.onnx"))
    off: dict[str, float] = {}

    def compare(layer: str, operands: list[np.ndarray], wanted: np.ndarray) -> None:
        found = cutter.run(layer, operands).reshape(wanted.shape)
        off[layer] = float(np.abs(found - wanted).max() / np.abs(wanted).max())

    Reference(load_model("demo"), plan).watch_layers(_images(bundle), compare)
    assert off.keys() == set(plan.layers)
    assert max(off.values()) < 1e-5, max(off, key=lambda layer: off[layer])


def test_a_convolution_in_integers_puts_out_the_codes_of_its_reference(bundle: Path) -> None:
    """ONNX Runtime rounds its bias, and so does the reference: else an engine of `--spare none` fails its check."""
    plan, cutter = _plan(bundle), LayerCutter(ir.load(bundle / "model.onnx"))
    labelled = load_model("demo").labelled
    assert labelled is not None
    images = open_images(f"npz:{labelled}", load_model("demo").preprocess).pixels[:100]
    differing: list[float] = []

    def compare(layer: str, operands: list[np.ndarray], wanted: np.ndarray) -> None:
        if rounded_to := plan.sites.get(f"{layer}.output"):
            differing.append(float((np.abs(cutter.run(layer, operands) - wanted) > rounded_to.scale / 2).mean()))

    Reference(load_model("demo"), plan).watch_layers(images, compare)
    assert max(differing, default=0.0) < 1e-5, "codes that are rounded the other way"


_BIASED = """
<ir_version: 10, opset_import: ["": 20]>
agraph (float[N, 4, 4] x, float[N, 4, 4] y) => (float[N, 4, 4] out) {
    [fc] product = MatMul (x, weight)
    biased = Add (product, bias)
    [qk] scores = MatMul (biased, y)
    out = Add (scores, table)
}
"""


def test_a_layer_ends_at_its_bias_and_a_product_of_two_activations_has_none() -> None:
    rng, model = np.random.default_rng(0), ir.from_proto(onnx.parser.parse_model(_BIASED))
    arrays = {"weight": rng.normal(size=(4, 4)), "bias": rng.normal(size=4), "table": rng.normal(size=(1, 4, 4))}
    by_name = {str(value.name): value for node in model.graph for value in node.inputs if value is not None}
    for name, array in arrays.items():
        by_name[name].const_value = ir.tensor(array.astype(np.float32), name=name)
        model.graph.initializers[name] = by_name[name]
    left, right = rng.normal(size=(2, 3, 4, 4)).astype(np.float32)
    cutter = LayerCutter(model)
    np.testing.assert_allclose(cutter.run("fc", [left]), left @ arrays["weight"] + arrays["bias"], rtol=1e-5)
    np.testing.assert_allclose(cutter.run("qk", [left, right]), left @ right, rtol=1e-5)


def test_dynamic_scales_are_found_as_the_operator_finds_them() -> None:
    values = np.random.default_rng(0).gamma(1.0, 2.0, size=(4, 50)).astype(np.float32) - 1
    node = onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero_point"])
    kinds = [onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8]
    outputs = [onnx.helper.make_tensor_value_info(n, k, None) for n, k in zip(node.output, kinds, strict=True)]
    inputs = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)]
    graph = onnx.helper.make_graph([node], "dynamic", inputs, outputs)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    codes, scale, zero_point = session.run(None, {"x": values})
    kept = QParams(np.float32(9), np.uint8(9), CODES["uint8"], None, dynamic=True)
    wanted = (codes.astype(np.float32) - zero_point) * scale
    np.testing.assert_array_equal(rounded(torch.from_numpy(values), kept).numpy(), wanted)


def test_with_everything_quantized_nothing_is_float(demo_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(demo_bundle, folder)
    assert dfq.export(_RECIPES["everything"], folder, limit=4).engine.census.counts == {"int8": 26}


def test_cutting_layers_prints_nothing(demo_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(demo_bundle, folder)
    dfq.export(_RECIPES["everything"], folder, limit=1)
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("layer", ["blocks.1.mlp.fc1", "blocks.3.attn.qkv"])
def test_a_layer_that_fell_back_to_float_is_told(demo_bundle: Path, tmp_path: Path, layer: str) -> None:
    model = ir.load(demo_bundle / "model.onnx")
    (node,) = (node for node in model.graph if node.name == layer)
    dequantize = node.inputs[0]
    assert dequantize is not None
    for _ in ("DequantizeLinear", "QuantizeLinear"):
        producer = dequantize.producer()
        assert producer is not None
        dequantize = producer.inputs[0]
        assert dequantize is not None
    node.replace_input_with(0, dequantize)
    ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=rf"computes `{layer}` in float") as caught:
        ort.build(tmp_path / "model.onnx", _plan(demo_bundle), _CPU)
    assert f"--spare auto,{layer}" in caught.value.fix


def test_every_layer_that_fell_back_is_in_the_advice(demo_bundle: Path) -> None:
    (floats,) = (demo_bundle / "work").glob("float-*.onnx")
    plan = _plan(demo_bundle)
    with pytest.raises(ExportError) as caught:
        ort.build(floats, plan, _CPU)
    assert f"--spare auto,{','.join(plan.layers)}" in caught.value.fix


def test_a_file_that_is_no_onnx_is_refused(demo_bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes((demo_bundle / "model.onnx").read_bytes()[:1000])
    with pytest.raises(BackendError, match="cannot load"):
        ort.load(broken, {}, _CPU)
    with pytest.raises(BackendError, match="cannot load"):
        ort.build(broken, _plan(demo_bundle), _CPU)
    with pytest.raises(BackendError, match="cannot load"):
        ort.load(tmp_path / "missing.onnx", {}, _CPU)


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="onnxruntime-gpu is installed"
)
def test_cuda_is_refused_where_it_is_not_there(demo_bundle: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # ONNX Runtime's own warning would be a second voice
        with pytest.raises(BackendError, match="does not run on `cuda` here"):
            ort.load(demo_bundle / "model.onnx", {}, BuildOptions(provider="cuda"))


def test_a_provider_that_does_not_exist_is_refused(demo_bundle: Path) -> None:
    with pytest.raises(BackendError, match="no provider named `tpu`"):
        ort.load(demo_bundle / "model.onnx", {}, BuildOptions(provider="tpu"))


def test_a_closed_engine_says_so(demo_bundle: Path) -> None:
    engine = ort.load(demo_bundle / "model.onnx", {}, _CPU)
    images = _images(demo_bundle)
    assert engine(images).shape == (2, 10)
    engine.close()
    with pytest.raises(BackendError, match="engine is closed"):
        engine(images)
