"""TensorRT for RTX without a GPU: real engines of real architectures, and what each of their layers is computed in."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir
import pytest

import dfq_deploy as dfq
from calibrators.collectors import Subject
from calibrators.collectors.pytorch import collect_ranges
from calibrators.errors import BackendError, BundleError, ExportError, NotHereError
from calibrators.files import sha256_of
from calibrators.plan import QuantPlan, make_plan
from calibrators.ranges import Ranges
from calibrators.scheme import scheme_named
from calibrators.sites import block_ranges
from dfq_deploy.building import float_onnx
from dfq_deploy.evaluate import Check
from dfq_deploy.generation import GenerateOptions
from dfq_deploy.generation.generators import noise
from dfq_deploy.models import Model
from dfq_deploy.models.loading import load_model
from exporters.backends import BuildOptions, rtx
from exporters.bundle import MANIFEST, open_bundle
from exporters.cast import CastBody
from exporters.census import Body, Census
from exporters.qdq import InsertQDQ
from exporters.tensorrt import cuda
from exporters.to_onnx import save_model

tensorrt_rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
pytestmark = pytest.mark.skipif(cuda.device() is not None, reason="there is a GPU here: tests/gpu runs the engines")

_TARGETS = ("sm89", "sm120")
_LINEAR = 24  # in test_vit: six blocks of qkv, proj, fc1 and fc2
_MATMULS = 12  # and two attention matmuls in each
_SCHEMES = {"w8a8": "int8", "w4a16": "int4", "w8a8_fp8": "fp8", "float": ""}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a test_vit: images and the float model, made once."""
    folder = tmp_path_factory.mktemp("stages")
    dfq.export(_recipe("float"), folder, limit=2)
    return folder / "work"


def _recipe(scheme: str, body: Body = "fp32", **other: Any) -> dfq.Recipe:
    made_of: dict[str, Any] = {"model": "test_vit", "random_weights": True, "generator": "noise", "count": 2}
    built_for: dict[str, Any] = {"backend": "rtx", "target": ",".join(_TARGETS), "batch": "1,2,4", "float": body}
    return dfq.Recipe(**made_of, **built_for, scheme=scheme, block=32, **other)  # its widths hold no two blocks of 64


def _exported(recipe: dfq.Recipe, stages: Path, folder: Path) -> Check:
    shutil.copytree(stages, folder / "work")
    return dfq.export(recipe, folder, limit=2)


@pytest.mark.parametrize("body", ["fp32", "fp16"])
@pytest.mark.parametrize("scheme", _SCHEMES)
def test_every_layer_is_computed_in_what_the_plan_says(stages: Path, tmp_path: Path, scheme: str, body: Body) -> None:
    found = _exported(_recipe(scheme, body), stages, tmp_path)
    manifest = open_bundle(tmp_path)
    facts, planned = manifest.engine, _SCHEMES[scheme] or body
    layers = Counter({planned: _LINEAR})
    layers[body] += _MATMULS
    layers[planned if scheme == "w8a8" else body] += 1  # the patch convolution, which INT8 alone can hold
    layers[planned if scheme == "w4a16" else body] += 1  # the head, which float activations need not spare
    assert facts.census.counts == layers
    assert (facts.state, facts.note, facts.options.targets) == ("built", "", _TARGETS)
    assert facts.made_for == {"tensorrt_rtx": tensorrt_rtx.__version__, "targets": "sm89,sm120"}
    assert facts.kernels["matmul"] + facts.kernels.get("attention", 0) >= _LINEAR
    assert ("attention" in facts.kernels) == (body != "fp32"), "RTX fuses attention in half precision only"
    assert manifest.files["model.engine"] == sha256_of(tmp_path / "model.engine")
    assert json.loads((tmp_path / "report.json").read_text())["engine"] == facts.report()
    assert found.ran == "model.onnx in ONNX Runtime"
    assert found.reason.startswith("the engine has not run: there is no NVIDIA GPU that can be used here: ")
    assert found.verdict == "undecided" if body == "fp32" else found.verdict != "pass"


@pytest.mark.parametrize(("scheme", "body"), [("w8a8", "fp32"), ("w8a8_fp8", "fp16")])
def test_attention_matmuls_are_quantized_where_that_is_asked_for(
    stages: Path, tmp_path: Path, scheme: str, body: Body
) -> None:
    _exported(_recipe(scheme, body, attention=True), stages, tmp_path)
    patch = int(scheme == "w8a8")
    counts = {_SCHEMES[scheme]: _LINEAR + _MATMULS + patch, body: 2 - patch}
    assert open_bundle(tmp_path).engine.census.counts == counts


def test_a_bf16_body_is_built(stages: Path, tmp_path: Path) -> None:
    with suppress(BackendError):  # of the check: ONNX Runtime cannot stand in for the engine, its CPU has no bf16
        _exported(_recipe("w8a8", "bf16"), stages, tmp_path)
    facts = open_bundle(tmp_path).engine
    assert (facts.state, facts.census.counts) == ("built", {"int8": _LINEAR + 2 - 1, "bf16": _MATMULS + 1})


@pytest.fixture(scope="module")
def bundle(stages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of INT8; copy it before changing it."""
    folder = tmp_path_factory.mktemp("rtx") / "bundle"
    _exported(_recipe("w8a8"), stages, folder)
    return folder


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("work"))
    return tmp_path / "bundle"


def _changed(folder: Path, **engine: Any) -> None:
    facts = json.loads((folder / MANIFEST).read_text())
    facts["engine"].update(engine)
    (folder / MANIFEST).write_text(json.dumps(facts))


def test_a_model_is_always_built_into_the_same_bytes(copied: Path) -> None:
    before = open_bundle(copied)
    after = dfq.build(copied)
    assert after == before


def test_the_bundle_holds_what_the_manifest_names_and_no_more(copied: Path) -> None:
    names = set(open_bundle(copied).files)
    assert names == {"model.onnx", "plan.safetensors", "model.engine", "classes.txt"}
    assert {file.name for file in copied.iterdir()} == names | {MANIFEST, "recipe.toml", "report.json"}


def test_an_altered_engine_is_refused_with_the_command_that_builds_it(copied: Path) -> None:
    good = sha256_of(copied / "model.engine")
    (copied / "model.engine").write_bytes(b"of a build that was killed before the manifest")
    with pytest.raises(BundleError, match=r"model\.engine` is altered") as caught:
        dfq.load(copied)
    assert caught.value.fix.endswith(f"dfq-deploy build {copied}")
    assert dfq.build(copied).files["model.engine"] == good
    (copied / "model.engine").unlink()
    with pytest.raises(BundleError, match=r"model\.engine` is missing"):
        dfq.load(copied)


def test_an_engine_of_another_version_is_refused_before_it_is_read(copied: Path) -> None:
    _changed(copied, made_for={"tensorrt_rtx": "1.4.0", "targets": ""})
    with pytest.raises(BackendError, match=r"was made for tensorrt_rtx 1\.4\.0") as caught:
        dfq.load(copied)
    assert tensorrt_rtx.__version__ in caught.value.why
    assert caught.value.fix.endswith(f"dfq-deploy build {copied}")


def test_without_tensorrt_rtx_the_engine_is_not_loaded_and_stays(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "trt", None)
    with pytest.raises(NotHereError) as caught:
        dfq.load(copied)
    assert caught.value.fix == "pip install 'dfq-deploy[rtx]'."
    before = open_bundle(copied)
    with pytest.raises(NotHereError, match="the one that it has stays") as caught:
        dfq.build(copied)
    assert caught.value.why == "TensorRT for RTX is not installed here."
    assert open_bundle(copied) == before


def test_a_layer_that_falls_to_float_fails_the_export_and_is_named(
    stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rtx, "prepare", lambda model, plan, options: None)
    with pytest.raises(ExportError) as caught:
        _exported(_recipe("w8a8"), stages, tmp_path)
    qkv = [f"blocks.{block}.attn.qkv" for block in range(6)]
    assert caught.value.what == f"the engine computes `{qkv[0]}` in float, and 5 more layers of the plan."
    assert "reads fp32, int8, or its weight is dequantized by a kernel of its own" in caught.value.why
    assert caught.value.fix == f"spare them with --spare auto,{','.join(qkv)}, or use another backend."
    assert not (tmp_path / MANIFEST).exists()
    spared = _recipe("w8a8", spare="auto," + ",".join(qkv))
    dfq.export(spared, tmp_path, limit=2)
    assert open_bundle(tmp_path).engine.census.counts == {"int8": _LINEAR - 6 + 1, "fp32": _MATMULS + 6 + 1}


class _Architecture(NamedTuple):
    model: Model
    ranges: Ranges
    floats: Path


@pytest.fixture(scope="module", params=["deit_t", "vit_b", "swin_t"])
def architecture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Architecture]:
    """A full-size model with random weights, its ranges on an image of noise, and its float ONNX model."""
    model = load_model(request.param, random_weights=True)
    images = noise.generate(model, GenerateOptions(count=1, seed=0, exact=False))
    ranges = collect_ranges(
        Subject(model.module, model.fingerprint), images, observer="minmax", percentile=100, codes=None
    )
    floats = tmp_path_factory.mktemp(request.param) / "float.onnx"
    float_onnx(model, floats)
    yield _Architecture(model, ranges, floats)
    floats.unlink()  # a third of a gigabyte that pytest would keep for days


def _planned(architecture: _Architecture, scheme_name: str) -> QuantPlan:
    model, ranges, _ = architecture
    scheme = scheme_named(scheme_name)
    if scheme.blocked:
        ranges = replace(ranges, sites={**ranges.sites, **block_ranges(model.module, (16, 32, 64))})
    spare = {} if scheme.activation is None else dict.fromkeys(model.classifiers, "it puts out the logits")
    return make_plan(ranges, scheme, outputs=False, spare=spare)


def _built(architecture: _Architecture, plan: QuantPlan, body: Body, folder: Path) -> Census:
    options = BuildOptions(body=body, targets=_TARGETS[:1], batch=(1, 2, 4))
    rtx.check(plan, options)
    model = InsertQDQ(plan)(ir.load(architecture.floats)).model
    model = model if body == "fp32" else CastBody(body)(model).model
    rtx.prepare(model, plan, options)
    save_model(model, folder / "model.onnx")
    built = rtx.build(folder / "model.onnx", plan, options)
    assert (built.state, built.files) == ("built", ("model.engine",))
    for name in ("model.onnx", "model.engine"):
        assert (folder / name).stat().st_size > 1000
        (folder / name).unlink()
    return built.census


_COUNTS = {  # patch and linear layers; head and attention matmuls; Swin-T has three layers that merge patches, too
    "w8a8": {"deit_t": (49, 25), "vit_b": (49, 25), "swin_t": (52, 25)},
    "w4a16": {"deit_t": (49, 25), "vit_b": (49, 25), "swin_t": (52, 25)},
    "w8a8_fp8": {"deit_t": (48, 26), "vit_b": (48, 26), "swin_t": (51, 26)},
    "float": {"deit_t": (0, 74), "vit_b": (0, 74), "swin_t": (0, 77)},
}


@pytest.mark.parametrize(
    ("scheme", "body"),
    [("w8a8", "fp32"), ("w8a8", "fp16"), ("w4a16", "fp32"), ("w8a8_fp8", "fp32"), ("float", "fp16")],
)
def test_full_size_models_are_computed_in_what_the_plan_says(
    architecture: _Architecture, tmp_path: Path, scheme: str, body: Body
) -> None:
    census = _built(architecture, _planned(architecture, scheme), body, tmp_path)
    name = next(alias for alias in _COUNTS[scheme] if architecture.floats.parent.name.startswith(alias))
    quantized, floats = _COUNTS[scheme][name]
    planned = _SCHEMES[scheme]
    assert census.counts == {**({planned: quantized} if planned else {}), body: floats}
