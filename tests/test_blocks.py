"""INT4 weights in blocks and FP8, from ranges over plans to what stands in the ONNX file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from calibrators.affine import CODES, Codes, choose_qparams, fake_quantize
from calibrators.errors import PlanError
from calibrators.plan import QParams, QuantPlan, make_plan, shortened
from calibrators.ranges import Ranges, SiteRange
from calibrators.scheme import SCHEMES
from calibrators.sites import Mode, attach_sites, block_ranges, fitting_block, set_mode
from exporters.qdq import InsertQDQ
from exporters.scales import shorten_scales

_BLOCKS = (16, 32, 64, 128)
_INT4, _UINT4, _FP8 = CODES["int4"], CODES["uint4"], CODES["float8_e4m3fn"]
_LINEAR = """<ir_version: 10, opset_import: ["": 20]> agraph (float[N, 128] x) => (float[N, 6] y) {
    [fc] m = MatMul (x, w)
    y = Add (m, b)
}"""

every_block = pytest.mark.parametrize("block", _BLOCKS)


def _values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _layers(*in_features: int) -> nn.Module:
    """Linear layers `0`, `1`, … with 6 outputs, and a convolution."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(size, 6) for size in in_features), nn.Conv2d(64, 6, 1))
    attach_sites(module)
    return module


def _range(role: str, low: Any, high: Any, shape: tuple[int, ...], axis: int | None = None) -> SiteRange:
    return SiteRange(np.asarray(low, np.float32), np.asarray(high, np.float32), role, axis, shape)


def _ranges(module: nn.Module, block: int | None) -> Ranges:
    """Ranges of `module` as calibration gives them, those of weights in blocks where it asks for blocks."""
    sites = {}
    for name, layer in module.named_children():
        weight = layer.weight.detach().flatten(1)
        low, high = weight.amin(1).numpy(), weight.amax(1).numpy()
        sites[f"{name}.input"] = _range("input", -3, 3, (weight.shape[1],))
        sites[f"{name}.weight"] = _range("weight", low, high, tuple(layer.weight.shape), axis=0)
        if isinstance(layer, nn.Conv2d):
            sites[f"{name}.output"] = _range("output", -5, 5, (6,))
    for side in ("lhs", "rhs"):
        sites[f"attn.qk.{side}"] = _range("operand", -4, 4, (2, 2))
    return Ranges(
        sites | (block_ranges(module, (block,)) if block else {}), model="m" * 64, images="i" * 64, observer="minmax"
    )


def _covering(values: np.ndarray, codes: Codes, block: int | None = None) -> QParams:
    """What `make_plan` gives a weight (out, in), or with no axis an input."""
    if block is None:
        return QParams(*choose_qparams(values.min(1), values.max(1), codes), codes, 0)
    blocks = values.reshape(len(values), -1, block)
    return QParams(*choose_qparams(blocks.min(2), blocks.max(2), codes), codes, 0, block)


@every_block
def test_ranges_of_blocks_are_the_smallest_and_largest_weight_of_each(block: int) -> None:
    module = _layers(256)
    (seen,) = block_ranges(module, (block,)).values()
    weight = module[0].weight.numpy(force=True)
    assert (seen.role, seen.axis, seen.shape, seen.block) == ("weight", 0, (6, 256), block)
    assert seen.low.shape == seen.high.shape == (6, 256 // block)
    for row in range(6):
        for index in range(256 // block):
            part = weight[row, index * block : (index + 1) * block]
            assert (seen.low[row, index], seen.high[row, index]) == (part.min(), part.max())


@given(size=st.integers(1, 300), block=st.sampled_from(_BLOCKS))
def test_there_are_blocks_where_two_or_more_whole_ones_fit(size: int, block: int) -> None:
    assert ("0.weight" in block_ranges(_layers(size), (block,))) == (size in range(2 * block, 301, block))


@pytest.mark.parametrize(("width", "block"), [(192, 64), (96, 32), (128, 64), (48, None), (384, 128), (256, 128)])
def test_a_layer_gets_the_largest_block_that_fits_it(width: int, block: int | None) -> None:
    found = block_ranges(_layers(width), (32, 64, 128))
    assert (found["0.weight"].block if found else None) == block
    assert fitting_block(width, (32, 64, 128)) == block


@every_block
def test_a_plan_of_blocks_spares_what_has_none_and_says_why(block: int) -> None:
    plan = make_plan(_ranges(_layers(256, block, 256 + block // 2), block), SCHEMES["w4a16"], attention=True)
    assert list(plan.sites) == ["0.weight"]
    weight = plan.sites["0.weight"]
    assert (weight.codes, weight.axis, weight.block) == (_INT4, 0, block)
    assert weight.scale.shape == weight.zero_point.shape == (6, 256 // block)
    assert (weight.zero_point.dtype, weight.zero_point.any()) == (np.int8, False)
    assert plan.layers == ["0"]
    assert plan.spared["1.weight"] == f"its {block} input channels are not two or more whole blocks"
    assert plan.spared["2.weight"] == f"its {256 + block // 2} input channels are not two or more whole blocks"
    assert plan.spared["3.weight"] == "w4a16 is for matrices: run-times have no such convolution"
    assert plan.spared["attn.qk.lhs"] == plan.spared["attn.qk.rhs"] == "an attention matmul has no weight"
    assert "0.input" not in plan.spared, "nobody asked for its activations to be quantized"


def test_what_is_asked_to_be_spared_keeps_its_own_reason_in_a_plan_of_blocks() -> None:
    ranges = _ranges(_layers(256, 256, 40), 64)
    plan = make_plan(ranges, SCHEMES["w4a16"], spare={"0": "asked for", "2": "asked for"})
    assert plan.layers == ["1"]
    assert plan.spared["0.weight"] == plan.spared["2.weight"] == "asked for"


def test_a_plan_of_blocks_of_a_model_without_any_is_refused() -> None:
    with pytest.raises(PlanError, match="quantizes nothing") as caught:
        make_plan(_ranges(_layers(100), 64), SCHEMES["w4a16"])
    assert caught.value.why == "its 100 input channels are not two or more whole blocks"


def test_fp8_is_for_inputs_and_weights_of_matrices_alone() -> None:
    plan = make_plan(_ranges(_layers(100), None), SCHEMES["w8a8_fp8"], attention=True)
    assert {name: site.codes for name, site in plan.sites.items()} == dict.fromkeys(
        ["0.input", "0.weight", "attn.qk.lhs", "attn.qk.rhs"], _FP8
    )
    assert plan.spared.keys() == {"1.input", "1.weight", "1.output"}
    assert plan.sites["0.input"].scale == np.float32(3 / 448)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_asym"])
def test_without_outputs_a_convolution_keeps_its_input_and_weight(scheme: str) -> None:
    ranges = _ranges(_layers(100), None)
    fused, plain = (make_plan(ranges, SCHEMES[scheme], outputs=outputs) for outputs in (True, False))
    assert fused.sites.keys() - plain.sites.keys() == {"1.output"}
    assert plain.sites.keys() >= {"1.input", "1.weight"}
    assert "1.output" not in plain.spared, "nobody asked for it"
    assert plain.spared == fused.spared


def test_the_float_scheme_quantizes_nothing() -> None:
    ranges = _ranges(_layers(256), None)
    plan = make_plan(ranges, SCHEMES["float"], attention=True)
    assert (plan.sites, plan.layers) == ({}, [])
    assert plan.spared == dict.fromkeys(ranges.sites, "the scheme leaves everything in float")


@pytest.fixture
def plans() -> dict[str, QuantPlan]:
    module = _layers(256, 100)
    return {
        name: make_plan(_ranges(module, 64 if scheme.blocked else None), scheme) for name, scheme in SCHEMES.items()
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_plan_of_every_scheme_comes_back_as_it_was_saved(
    plans: dict[str, QuantPlan], tmp_path: Path, scheme: str
) -> None:
    plan = plans[scheme]
    plan.save(tmp_path / "plan.safetensors")
    loaded = QuantPlan.load(tmp_path / "plan.safetensors")
    assert loaded.fingerprint == plan.fingerprint
    for name, site in plan.sites.items():
        again = loaded.sites[name]
        assert (again.codes, again.axis, again.block) == (site.codes, site.axis, site.block)
        np.testing.assert_array_equal(again.scale, site.scale, strict=True)
        np.testing.assert_array_equal(again.zero_point, site.zero_point, strict=True)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_a_header_names_blocks_only_where_there_are_some(
    plans: dict[str, QuantPlan], tmp_path: Path, scheme: str
) -> None:
    plans[scheme].save(tmp_path / "plan.safetensors")
    with safe_open(tmp_path / "plan.safetensors", "numpy") as file:
        sites = json.loads(file.metadata()["dfq_plan"])["sites"]
    assert sites["0.weight"].get("block") == (64 if scheme == "w4a16" else None)
    assert {name for name, site in sites.items() if "block" in site} == ({"0.weight"} if scheme == "w4a16" else set())


def test_ranges_of_blocks_come_back_as_they_were_saved(tmp_path: Path) -> None:
    ranges = _ranges(_layers(256, 100), 64)
    ranges.save(tmp_path / "ranges.safetensors")
    loaded = Ranges.load(tmp_path / "ranges.safetensors")
    assert {name: seen.block for name, seen in loaded.sites.items() if seen.block} == {"0.weight": 64}
    np.testing.assert_array_equal(loaded.sites["0.weight"].low, ranges.sites["0.weight"].low, strict=True)


def test_the_fingerprint_knows_the_size_of_blocks() -> None:
    plan = make_plan(_ranges(_layers(256), 64), SCHEMES["w4a16"])
    weight = dataclasses.replace(plan.sites["0.weight"], block=32)
    assert dataclasses.replace(plan, sites={"0.weight": weight}).fingerprint != plan.fingerprint


@given(rows=st.integers(1, 5), blocks=st.integers(2, 5), block=st.sampled_from(_BLOCKS))
def test_along_gives_each_column_the_scale_of_its_block(rows: int, blocks: int, block: int) -> None:
    scales = _values(rows, blocks) ** 2 + 1
    scale, zero = QParams(scales, np.zeros((rows, blocks), np.int8), _INT4, 0, block).along(2)
    assert scale.shape == zero.shape == (rows, blocks * block)
    assert (scale.dtype, zero.dtype) == (np.float32, np.float32)
    for column in range(blocks * block):
        np.testing.assert_array_equal(scale[:, column], scales[:, column // block])


@every_block
@torch.inference_mode()
def test_the_reference_rounds_each_block_by_its_own_scale(block: int) -> None:
    module = _layers(256)
    layer, x = module[0], torch.from_numpy(_values(3, 256))
    weight = layer.weight.numpy(force=True)
    q = _covering(weight, _INT4, block)
    set_mode(module, Mode.FAKE, qparams={"0.weight": q})
    parts = [
        fake_quantize(weight[:, start : start + block], *QParams(s, z, _INT4, 0).along(2), _INT4)
        for start, s, z in zip(range(0, 256, block), q.scale.T, q.zero_point.T, strict=True)
    ]
    rounded = torch.from_numpy(np.concatenate(parts, axis=1))
    assert torch.equal(layer(x), F.linear(x, rounded, layer.bias))
    assert not torch.equal(rounded, layer.weight)


def _quantized(w: np.ndarray, sites: dict[str, QParams]) -> ir.Model:
    """The linear layer with the weight `w` (in, out) after the Q/DQ pass."""
    constants = [ir.tensor(value, name=name) for name, value in {"w": w, "b": _values(6, seed=2)}.items()]
    plan = QuantPlan(sites, {}, scheme="", model="m", images="i")
    model = InsertQDQ(plan)(ir.from_onnx_text(_LINEAR, initializers=constants)).model
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def _run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    """What the model computes, operator by operator."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(model).SerializeToString()
    found: np.ndarray = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )[0]
    return found


@pytest.mark.parametrize("block", _BLOCKS[:-1])
def test_a_weight_in_blocks_is_stored_in_half_a_byte_and_read_in_blocks(block: int) -> None:
    w = _values(128, 6, seed=1)
    model = _quantized(w, {"fc.weight": _covering(w.T, _INT4, block)})
    assert model.opset_imports[""] == 21, "the first with blocks"
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "MatMul", "Add"]
    attributes = {name: value.as_int() for name, value in model.graph[0].attributes.items()}
    assert attributes == {"axis": 0, "block_size": block}
    stored = {proto.name: proto for proto in ir.to_proto(model).graph.initializer}
    assert stored.keys() == {"fc.weight.int4", "fc.weight.scale", "fc.weight.zero_point", "b"}
    codes, scale = stored["fc.weight.int4"], stored["fc.weight.scale"]
    assert (codes.data_type, len(codes.raw_data)) == (onnx.TensorProto.INT4, 128 * 6 // 2)
    assert (list(codes.dims), list(scale.dims)) == ([128, 6], [128 // block, 6])
    assert stored["fc.weight.zero_point"].data_type == onnx.TensorProto.INT4


def test_an_asymmetric_weight_and_its_zero_points_are_stored_in_half_a_byte() -> None:
    w = _values(128, 6, seed=1) + 1
    q = _covering(w.T, _UINT4, 32)
    assert len(np.unique(q.zero_point)) > 3
    stored = {proto.name: proto for proto in ir.to_proto(_quantized(w, {"fc.weight": q})).graph.initializer}
    codes, zero = stored["fc.weight.uint4"], stored["fc.weight.zero_point"]
    assert (codes.data_type, len(codes.raw_data)) == (onnx.TensorProto.UINT4, 128 * 6 // 2)
    assert (zero.data_type, len(zero.raw_data)) == (onnx.TensorProto.UINT4, 128 // 32 * 6 // 2)


@pytest.mark.parametrize("codes", [_INT4, _UINT4], ids=lambda codes: codes.name)
@pytest.mark.parametrize("block", _BLOCKS[:-1])
def test_a_layer_with_blocks_computes_what_the_formulas_say(block: int, codes: Codes) -> None:
    x, w = _values(32, 128), _values(128, 6, seed=1)
    q = _covering(w.T, codes, block)
    rounded = fake_quantize(w.T, *q.along(2), codes).T
    np.testing.assert_allclose(_run(_quantized(w, {"fc.weight": q}), x), x @ rounded + _values(6, seed=2), atol=1e-5)
    assert np.abs(rounded - w).max() > 0.1, "INT4 is coarse"


@pytest.mark.parametrize("size", [1, 1.5e-4, 1e-7])
def test_scales_are_shortened_where_all_stay_as_good_as_they_were(size: float) -> None:
    scales = np.abs(_values(6, 4)) * np.float32(size) + np.float32(size / 4)
    found = shortened(scales)
    if size < 1e-6:
        assert np.array_equal(found, scales), "float16 has too few digits there"
    else:
        assert np.array_equal(found, scales.astype(np.float16).astype(np.float32))
        assert not np.array_equal(found, scales)


@pytest.mark.parametrize("size", [1, 1e-7])
def test_short_scales_take_half_the_bytes_and_change_nothing(size: float) -> None:
    x, w = _values(32, 128), _values(128, 6, seed=1) * np.float32(size)
    q = _covering(w.T, _UINT4, 32)
    q = dataclasses.replace(q, scale=shortened(q.scale))
    model = _quantized(w, {"fc.weight": q})
    before = _run(model, x)
    shorten_scales(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    stored = {proto.name: proto for proto in ir.to_proto(model).graph.initializer}["fc.weight.scale"]
    assert len(stored.raw_data) == (2 if size == 1 else 4) * 6 * 4
    assert np.array_equal(_run(model, x), before)


def test_without_blocks_the_opset_stays() -> None:
    w = _values(128, 6, seed=1)
    x = QParams(np.array(0.05, np.float32), np.array(0, np.int8), CODES["int8"], None)
    model = _quantized(w, {"fc.input": x, "fc.weight": _covering(w.T, CODES["int8"])})
    assert model.opset_imports[""] == 20


def test_a_layer_in_fp8_computes_what_the_formulas_say() -> None:
    x, w = _values(32, 128), _values(128, 6, seed=1)
    sites = {
        "fc.input": QParams(*choose_qparams(x.min() / 2, x.max() / 2, _FP8), _FP8, None),  # the rest saturates
        "fc.weight": _covering(w.T, _FP8),
    }
    model = _quantized(w, sites)
    stored = {proto.name: proto for proto in ir.to_proto(model).graph.initializer}
    codes = stored["fc.weight.float8_e4m3fn"]
    assert (codes.data_type, len(codes.raw_data)) == (onnx.TensorProto.FLOAT8E4M3FN, 128 * 6)
    assert stored["fc.input.zero_point"].data_type == onnx.TensorProto.FLOAT8E4M3FN
    rounded = [fake_quantize(v, *sites[n].along(2), _FP8) for n, v in {"fc.input": x, "fc.weight": w.T}.items()]
    wanted = rounded[0] @ rounded[1].T + _values(6, seed=2)
    assert not np.allclose(wanted, x @ w + _values(6, seed=2), atol=1e-2)
    np.testing.assert_allclose(_run(model, x), wanted, atol=1e-4)
