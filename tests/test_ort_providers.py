"""ONNX Runtime beyond INT8 on a CPU: INT4 weights, providers that are not there, and what is refused beforehand."""

import itertools
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import dfq_deploy as dfq
from calibrators.affine import CODES
from calibrators.errors import BackendError, BundleError, ExportError, NotHereError
from calibrators.folds import layers_of
from calibrators.images import ImageSet
from calibrators.plan import QParams, QuantPlan
from dfq_deploy import formats
from dfq_deploy.cli import run
from dfq_deploy.models.loading import load_model
from dfq_deploy.reference import Reference
from exporters import ort_engine
from exporters.backends import BuildOptions, Placement, ort
from exporters.bundle import MANIFEST, Manifest, open_bundle, seal_bundle

_NOISE = ["--model", "demo", "--generator", "noise", "--count", "8"]
_BLOCKS = (32, 64, 128)
_ABSENT = [
    name for name, provider in ort_engine.PROVIDERS.items() if provider not in onnxruntime.get_available_providers()
]
_PROVIDERS = ("cpu", "cuda", "tensorrt", "rtx")
_SCALAR, _ZERO = np.array(0.05, np.float32), np.array(0, np.int8)

every_absent_provider = pytest.mark.parametrize("provider", _ABSENT)


@pytest.fixture(scope="module", params=[32, 64, 128])
def int4(
    request: pytest.FixtureRequest, demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    """The size of blocks, and a bundle of the demo with INT4 weights."""
    folder = tmp_path_factory.mktemp("int4") / "bundle"
    shutil.copytree(demo_bundle, folder)
    block = request.param
    recipe = dfq.Recipe(
        model="demo", generator="noise", count=8, refine="none", spare="none", scheme="w4a16", block=block
    )
    assert dfq.export(recipe, folder, limit=16).verdict == "pass"
    return block, folder


@pytest.fixture
def copied(demo_bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(demo_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def _plan(folder: Path) -> QuantPlan:
    return QuantPlan.load(folder / "plan.safetensors")


def _images(folder: Path) -> np.ndarray:
    (file,) = (folder / "work").glob("images-*.safetensors")
    return ImageSet.load(file).pixels[:8]


def test_weights_in_blocks_become_one_operator(int4: tuple[int, Path], tmp_path: Path) -> None:
    block, folder = int4
    options = ort_engine.session_options()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    nodes = [node for node in onnx.load(tmp_path / "optimised.onnx").graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == len(_plan(folder).layers) == 17
    for node in nodes:
        facts = {a.name: a.i for a in node.attribute}
        fitting = min(block, facts["K"] // 2)
        assert (facts["bits"], facts["block_size"], facts["accuracy_level"]) == (4, fitting, 1)


def test_the_census_of_weights_in_blocks_is_int4(int4: tuple[int, Path]) -> None:
    block, folder = int4
    plan, facts = _plan(folder), open_bundle(folder).engine
    assert {layer for layer, kind in facts.precision.items() if kind == "int4"} == set(plan.layers)
    assert set(facts.precision.values()) == {"int4", "fp32"}
    smaller = {layer for layer in plan.layers if plan.sites[f"{layer}.weight"].block != block}
    assert len(smaller) == {32: 0, 64: 13, 128: 13}[block]
    assert facts.reasons.keys() == facts.precision.keys() - set(plan.layers) | smaller, "each other one has its reason"
    assert facts.reasons["patch_embed.proj"] == f"{plan.scheme} is for matrices: run-times have no such convolution"
    if block == 128:
        why = "its 64 input channels are not two or more blocks of 128: it has blocks of 32"
        assert facts.reasons["blocks.0.attn.qkv"] == why


def test_weights_in_blocks_have_zero_points_here(int4: tuple[int, Path]) -> None:
    _, folder = int4
    assert {site.codes.name for site in _plan(folder).sites.values()} == {"uint4"}
    initializers = onnx.load(folder / "model.onnx").graph.initializer
    kinds = Counter(tensor.data_type for tensor in initializers if ".weight." in tensor.name)
    assert kinds == {onnx.TensorProto.UINT4: 2 * 17, onnx.TensorProto.FLOAT16: 17}, "codes, zero-points and scales"


def test_noisy_layers_get_int8_weights_which_the_census_knows(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_WANTED_WEIGHTS_DB", 1000)
    monkeypatch.setattr(formats, "_BUDGET", 64 * 256 / 2 + 1)  # room for one layer of an mlp, or four smaller ones
    shutil.copytree(demo_bundle, tmp_path / "bundle")
    recipe = dfq.Recipe(model="demo", generator="noise", count=8, refine="none", scheme="w4a16", block=32)
    assert dfq.export(recipe, tmp_path / "bundle", limit=16).verdict == "pass"
    plan, facts = _plan(tmp_path / "bundle"), open_bundle(tmp_path / "bundle").engine
    finer = {layer for layer, kind in facts.precision.items() if kind == "int8"}
    assert finer
    assert {layer for layer, kind in facts.precision.items() if kind == "int4"} == set(plan.layers) - finer
    for layer in finer:
        assert re.fullmatch(r"it makes \d+% of the noise in the logits: its weights have 8 bits", facts.reasons[layer])
        site = plan.sites[f"{layer}.weight"]
        assert (site.codes.name, site.block, site.scale.ndim) == ("int8", None, 1)
    assert sum(np.prod(layers_of(load_model("demo").module)[layer].weight.shape) for layer in finer) <= 64 * 256 + 2


def test_float_activations_are_what_the_accuracy_level_asks_for(int4: tuple[int, Path]) -> None:
    _, folder = int4
    images = _images(folder)
    wanted = Reference(load_model("demo"), _plan(folder)).quantized(images)
    found = ort.load(folder / "model.onnx", {}, BuildOptions())(images)
    careless = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert np.abs(careless.run(None, {"images": images})[0] - wanted).max() > 1e-4 * np.abs(wanted).max()


def test_weights_alone_are_unpacked_when_they_are_loaded(
    int4: tuple[int, Path], demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    plain = ort_engine.session_options

    def options(*, exact: bool = False, threads: int | None = None) -> onnxruntime.SessionOptions:
        asked.append(exact)
        return plain(exact=exact, threads=threads)

    monkeypatch.setattr(ort_engine, "session_options", options)
    for folder in (int4[1], demo_bundle):
        ort.load(folder / "model.onnx", {}, BuildOptions()).close()
    assert asked == [True, False]


def test_a_float_weight_where_int4_was_planned_is_told(int4: tuple[int, Path]) -> None:
    _, folder = int4
    (floats,) = (folder / "work").glob("float-*.onnx")
    with pytest.raises(ExportError, match="in float") as caught:
        ort.build(floats, _plan(folder), BuildOptions())
    assert caught.value.why == "its node is MatMul in the graph that ONNX Runtime runs."


def _of(codes: str, block: int | None = None) -> QuantPlan:
    """A plan of one layer."""
    weight = QParams(np.full((2, 4), 0.1, np.float32), np.zeros((2, 4), np.int8), CODES[codes], 0, block)
    if block is None:
        activation = CODES["uint8" if codes == "uint8" else codes]
        zero = np.array(128, np.uint8) if codes == "uint8" else _ZERO
        weight = QParams(
            np.full(2, 0.1, np.float32), np.zeros(2, np.int8), CODES["int8" if codes == "uint8" else codes], 0
        )
        sites = {"fc.input": QParams(_SCALAR, zero, activation, None), "fc.weight": weight}
    else:
        sites = {"fc.weight": weight}
    return QuantPlan(sites, {}, scheme=codes, model="m", images="i")


_PLANS = {
    "int8": _of("int8"),
    "uint8": _of("uint8"),
    "fp8": _of("float8_e4m3fn"),
    **{f"int4/{block}": _of("int4", block) for block in (16, *_BLOCKS)},
}
_TAKEN = {
    *itertools.product(["cpu"], ["int8", "uint8", "int4/32", "int4/64", "int4/128"], ["fp32"]),
    *itertools.product(["cuda"], ["int4/32", "int4/64", "int4/128"], ["fp32", "fp16", "bf16"]),
    *itertools.product(["tensorrt", "rtx"], ["int8", "fp8", "int4/64", "int4/128"], ["fp32", "fp16", "bf16"]),
    *itertools.product(["rtx"], ["int4/32"], ["fp32", "fp16", "bf16"]),
}


@pytest.mark.parametrize("body", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("plan", _PLANS)
@pytest.mark.parametrize("provider", _PROVIDERS)
def test_what_a_provider_has_no_kernels_for_is_refused(provider: str, plan: str, body: str) -> None:
    options = BuildOptions(provider=provider, body=body)  # type: ignore[arg-type]
    if (provider, plan, body) in _TAKEN:
        ort.check(_PLANS[plan], options)
        return
    with pytest.raises(BackendError) as caught:
        ort.check(_PLANS[plan], options)
    assert len(str(caught.value).splitlines()) == 3
    assert "--" in caught.value.fix, "it names a flag"


def test_cuda_takes_int8_where_it_is_of_weights_alone() -> None:
    weights = {site: q for site, q in _PLANS["int8"].sites.items() if site.endswith(".weight")}
    ort.check(QuantPlan(weights, {}, scheme="w4a16", model="m", images="i"), BuildOptions(provider="cuda"))


def test_no_provider_is_the_cpu() -> None:
    ort.check(_PLANS["int8"], BuildOptions())
    for refused in (BuildOptions(body="fp16"), BuildOptions(targets=("sm89",))):
        with pytest.raises(BackendError):
            ort.check(_PLANS["int8"], refused)


@pytest.mark.parametrize("provider", ["cpu", "cuda", "tensorrt", "rtx"])
def test_settings_of_tensorrts_builder_are_refused_where_they_mean_nothing(provider: str) -> None:
    taken = {"tensorrt": ["level", "workspace"], "rtx": ["workspace"]}.get(provider, [])
    for setting in ("level", "workspace"):
        options = BuildOptions(provider=provider, **{setting: 1})  # type: ignore[arg-type]
        if setting in taken:
            ort.check(_PLANS["int4/64"], options)
        else:
            with pytest.raises(BackendError, match="means nothing"):
                ort.check(_PLANS["int4/64"], options)


@pytest.mark.parametrize(("provider", "prefix"), [("tensorrt", "trt"), ("rtx", "nv")])
def test_tensorrt_inside_is_told_the_batch_sizes_and_keeps_its_engines_outside_the_bundle(
    demo_bundle: Path, provider: str, prefix: str
) -> None:
    options = BuildOptions(provider=provider, batch=(2, 4, 6), workspace=99)
    found = ort_engine.provider_options(provider, demo_bundle / "model.onnx", options)
    shapes = [found[f"{prefix}_profile_{end}_shapes"] for end in ("min", "opt", "max")]
    assert shapes == ["images:2x3x32x32", "images:4x3x32x32", "images:6x3x32x32"]
    assert found[f"{prefix}_max_workspace_size"] == "99"
    kept = [value for name, value in found.items() if name.endswith("_path")]
    assert kept and not any(value.startswith(str(demo_bundle)) for value in kept)


@pytest.mark.parametrize("provider", _PROVIDERS)
def test_only_tensorrt_quantizes_the_first_layer_and_no_output(provider: str) -> None:
    tensorrt = provider in ("tensorrt", "rtx")
    placed = ort.placement(BuildOptions(provider=provider))
    assert placed == Placement(
        first_layer=tensorrt,
        convolution_outputs=not tensorrt,
        noisy_layers=tensorrt,
        blocks=_BLOCKS[1:] if provider == "tensorrt" else _BLOCKS,
        zero_points=not tensorrt,
    )


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "rtx"])
def test_layers_are_timed_on_the_cpu_alone(provider: str) -> None:
    ort.time_layers((), (), BuildOptions(provider="cpu"))
    with pytest.raises(BackendError, match="does not say how long each layer takes"):
        ort.time_layers((), (), BuildOptions(provider=provider))


@pytest.mark.parametrize("scheme", ["w8a8_asym", "w8a8_dynamic"])
def test_tensorrt_is_advised_the_symmetric_scheme(scheme: str) -> None:
    plan = replace(_PLANS["uint8"], scheme=scheme)
    with pytest.raises(BackendError, match=r"fix: use --scheme w8a8, or use --backend ort with --provider cpu\.$"):
        ort.check(plan, BuildOptions(provider="tensorrt"))


def _scheme_for(provider: str) -> list[str]:
    return ["--scheme", "w4a16"] if provider == "cuda" else []


@every_absent_provider
def test_an_engine_for_a_provider_that_is_not_here_is_pending(
    copied: Path, provider: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", *_NOISE, "--out", str(copied), "--limit", "8", "--provider", provider]
    assert run([*command, *_scheme_for(provider)]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert f"engine: pending (ONNX Runtime does not run on `{provider}` here: it has cpu.)" in said
    assert f"build it on the machine that will run it: dfq-deploy build {copied}" in said
    assert "undecided: the engine has not run: ONNX Runtime does not run on" in said
    report = json.loads((copied / "report.json").read_text())
    assert (report["engine"]["state"], report["engine"]["layers"]) == ("pending", {}), "no engine was seen"
    assert report["ran"] == "model.onnx in ONNX Runtime"
    facts = open_bundle(copied).engine
    assert (facts.state, facts.options.provider, facts.files, facts.made_for) == ("pending", provider, [], {})


@every_absent_provider
def test_a_pending_engine_cannot_be_loaded_and_the_command_that_builds_it_is_named(
    copied: Path, provider: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", *_NOISE, "--out", str(copied), "--limit", "2", "--provider", provider]
    run([*command, *_scheme_for(provider)])
    with pytest.raises(BundleError, match="is not built yet") as caught:
        dfq.load(copied)
    assert f"`{provider}`" in caught.value.why
    assert caught.value.fix.endswith(f": dfq-deploy build {copied}")
    if provider == "cuda":
        dfq.load(copied, provider="cpu").close()  # which has the kernels for the same model
    else:
        with pytest.raises(BackendError, match="does not run on ONNX Runtime's `cpu`"):
            dfq.load(copied, provider="cpu")
    before = open_bundle(copied)
    capsys.readouterr()
    assert run(["build", str(copied)]) == 2, "it is as absent as before"
    assert "engine: pending" in capsys.readouterr().out
    assert open_bundle(copied) == before


@pytest.mark.skipif("cuda" not in _ABSENT, reason="the engine would be built")
def test_layers_of_a_pending_engine_are_held_to_the_body_that_they_compute_in(copied: Path) -> None:
    recipe = dfq.Recipe(
        model="demo", generator="noise", count=8, refine="none", scheme="w4a16", provider="cuda", float="fp16"
    )
    found = dfq.export(recipe, copied, limit=16)
    assert found.verdict == "undecided", found.reason
    assert 1e-4 < max(found.layer_error.values()) < 2e-3


@pytest.mark.skipif("tensorrt" not in _ABSENT, reason="the engine would be built")
@pytest.mark.parametrize("body", ["fp16", "bf16"])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16", "float"])
def test_another_body_is_no_fault_and_hides_none(copied: Path, scheme: str, body: str) -> None:
    recipe = dfq.Recipe(
        model="demo", generator="noise", count=8, refine="none", scheme=scheme, provider="tensorrt", float=body
    )
    found = dfq.export(recipe, copied, limit=64)
    assert found.verdict == "undecided", found.reason
    model = ir.load(copied / "model.onnx")
    constant = model.graph.initializers["norm.weight"].const_value
    assert constant is not None
    values = constant.numpy()
    wrong = (values * np.linspace(0.7, 1.3, values.size)).astype(values.dtype)
    model.graph.initializers["norm.weight"].const_value = ir.tensor(wrong, name="norm.weight")
    ir.save(model, copied / "model.onnx")
    manifest = Manifest.model_validate_json((copied / MANIFEST).read_bytes())
    seal_bundle(copied, manifest, list(manifest.files))
    assert dfq.check(copied, limit=64).verdict == "fail"


@every_absent_provider
def test_fp8_does_not_hide_that_the_provider_is_missing(copied: Path, provider: str) -> None:
    model = ir.load(copied / "model.onnx")
    for value in model.graph.initializers.values():
        constant = value.const_value
        if constant is not None and constant.dtype == ir.DataType.INT8:
            fp8 = constant.numpy().astype(np.float32).astype("float8_e4m3fn")
            value.const_value = ir.tensor(fp8, name=value.name)
    ir.save(model, copied / "model.onnx")
    with pytest.raises(BackendError, match="cannot load"):
        ort.load(copied / "model.onnx", {}, BuildOptions())
    with pytest.raises(NotHereError, match=f"does not run on `{provider}` here"):
        ort.load(copied / "model.onnx", {}, BuildOptions(provider=provider))


def test_a_built_bundle_is_built_again_as_it_was(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = open_bundle(copied)
    report = json.loads((copied / "report.json").read_text())
    assert run(["build", str(copied)]) == 0
    assert "layers: 16 in int8, 10 in fp32" in capsys.readouterr().out
    assert open_bundle(copied) == before
    assert json.loads((copied / "report.json").read_text()) == report


@every_absent_provider
def test_a_model_is_not_given_to_a_provider_that_it_was_not_made_for(copied: Path, provider: str) -> None:
    with pytest.raises(BackendError) as caught:
        dfq.load(copied, provider=provider)
    assert not isinstance(caught.value, NotHereError)
    assert "has no INT8 matmul" in caught.value.what if provider == "cuda" else "was made for cpu" in caught.value.why
