"""TensorRT where it is not: the engine is pending, RTX forecasts its layers, and nothing is claimed beyond that."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from pending import PENDING, export_pending
from surfaces import surface
from tiny_quantized import plan_for, quantized

import dfq_deploy as dfq
from calibrators.errors import BackendError, BundleError, NotHereError
from dfq_deploy.cli import run
from exporters.backends import BuildOptions, trt
from exporters.bundle import MANIFEST, open_bundle
from exporters.tensorrt import builder, cuda
from exporters.tensorrt.layers import Kernel

pytestmark = pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed here")

_BUILDS = BuildOptions(batch=(1, 2, 4))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    ir.save(quantized("fc", plan_for("fc")), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture(scope="module")
def pending(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose engine is pending; copy it before changing it."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    folder = tmp_path_factory.mktemp("trt") / "bundle"
    export_pending(demo_bundle, folder)
    return folder


def _here(monkeypatch: pytest.MonkeyPatch, name: str, gpu: str = "sm89") -> Any:
    """A machine with a GPU and the TensorRT of that surface, as far as their names go."""
    installed = surface(name)
    device = cuda.Device("NVIDIA L4", gpu, 24 << 30)
    monkeypatch.setattr(trt, "trt", installed)
    monkeypatch.setattr(cuda, "device", lambda: device)
    monkeypatch.setattr(cuda, "require", lambda: device)
    return installed


def test_the_engine_is_pending_and_rtx_forecasts_its_layers(pending: Path) -> None:
    facts = open_bundle(pending).engine
    assert (facts.state, facts.files, facts.made_for) == ("pending", [], {})
    assert facts.note.startswith("TensorRT is not installed here; TensorRT for RTX 1.")
    assert facts.note.endswith("builds the model, with its layers as listed.")
    assert facts.census.counts == {"int8": 17, "fp32": 9}
    assert facts.kernels["matmul"] >= 17
    assert not list(pending.glob("*.engine")), "RTX's engine is no engine of TensorRT's"


def test_the_check_of_a_pending_engine_is_undecided(pending: Path) -> None:
    report = json.loads((pending / "report.json").read_text())
    assert report["verdict"] == "undecided"
    assert report["reason"].startswith("the engine has not run: TensorRT is not installed here;")
    assert report["ran"] == "model.onnx in ONNX Runtime"
    assert report["engine"] == open_bundle(pending).engine.report()


def test_the_command_line_says_pending_with_the_command_and_exits_with_2(
    pending: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pending, tmp_path / "b")
    flags = [f"--{name}={value}" for name, value in PENDING.items()]
    assert run(["export", *flags, f"--out={tmp_path / 'b'}", "--limit=4"]) == 2
    said = "".join(capfd.readouterr().out.split())  # a line ends where the terminal does
    assert "engine:pending(TensorRTisnotinstalledhere;" in said
    assert f"builditonthemachinethatwillrunit:dfq-deploybuild{tmp_path / 'b'}" in said
    assert "layers:17inint8,9infp32" in said


def test_a_pending_engine_is_not_loaded(pending: Path) -> None:
    with pytest.raises(BundleError) as caught:
        dfq.load(pending)
    assert caught.value.what == f"the engine of `{pending}` is not built yet."
    assert caught.value.why == open_bundle(pending).engine.note
    assert caught.value.fix == f"run this on the machine that will run the engine: dfq-deploy build {pending}"


def test_without_rtx_no_layer_is_claimed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "rtx", None)
    built = trt.build(model, plan_for("fc"), _BUILDS)
    assert (built.state, built.files, built.note) == ("pending", (), "TensorRT is not installed here.")
    assert (built.census.precision, built.census.kernels) == ({}, {})


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_fp8"])
def test_with_tensorrt_but_no_gpu_the_note_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    ir.save(quantized("fc", plan_for("fc", scheme)), tmp_path / "model.onnx")
    monkeypatch.setattr(trt, "trt", surface("tensorrt-11.4"))
    monkeypatch.setattr(cuda, "device", lambda: None)
    built = trt.build(tmp_path / "model.onnx", plan_for("fc", scheme), _BUILDS)
    assert built.note.startswith("there is no NVIDIA GPU here; TensorRT for RTX")
    assert built.census.counts == {"int8" if scheme == "w8a8" else "fp8": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_what_rtx_alone_does_not_build_is_pending_with_its_reason(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

    def refuses(*_: Any, **__: Any) -> None:
        raise BackendError(what="tensorrt_rtx cannot build this model.", why="no kernel.", fix="report it.")

    monkeypatch.setattr(trt, "build_planned", refuses)
    built = trt.build(model, plan_for("fc"), _BUILDS)
    assert (built.state, built.files, built.census.precision) == ("pending", (), {})
    assert built.note.endswith("asked in its place: tensorrt_rtx cannot build this model. no kernel.")


@pytest.mark.parametrize("name", ["tensorrt-10.16", "tensorrt-11.4"])
def test_with_both_it_builds_for_the_gpu_at_hand(model: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    installed = _here(monkeypatch, name)
    asked: list[Any] = []
    nodes = frozenset({"fc", "fc.input.dequantize", "fc.weight.dequantize"})

    def builds(*arguments: Any, timing_cache: Path, judge: Callable[[list[Kernel]], object]) -> object:
        asked.extend([*arguments, timing_cache])
        return judge([Kernel("fc", "gemm ", ("int8",), ("int8",), nodes)])

    monkeypatch.setattr(builder, "build_engine", builds)
    built = trt.build(model, plan_for("fc"), BuildOptions(batch=(1, 2, 4), level=2, workspace=5))
    assert asked[:3] == [installed, model, model.with_name("model.engine")]
    options, timings = asked[3:]
    assert (options.batch, options.targets, options.level, options.workspace) == ((1, 2, 4), (), 2, 5)
    assert timings == model.with_name(f"timing-{installed.__version__}-sm89.cache")
    assert (built.state, built.files, built.note) == ("built", ("model.engine", timings.name), "")
    assert built.made_for == {"tensorrt": installed.__version__, "gpu": "NVIDIA L4 (sm89)"}


def test_fp8_is_refused_on_a_gpu_that_has_none(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _here(monkeypatch, "tensorrt-11.4", gpu="sm80")
    with pytest.raises(BackendError, match="FP8 cannot be built for sm80"):
        trt.build(model, plan_for("fc", "w8a8_fp8"), _BUILDS)


def _as_built(folder: Path, made_for: dict[str, str]) -> None:
    """The manifest of `folder` as if an engine had been built there; no test gets as far as reading it."""
    facts = json.loads((folder / MANIFEST).read_text())
    facts["engine"].update(state="built", made_for=made_for)
    (folder / MANIFEST).write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("made_for", "wrong"),
    [
        ({"tensorrt": "10.3.0", "gpu": "NVIDIA L4 (sm89)"}, "tensorrt 10.3.0"),
        ({"tensorrt": "HERE", "gpu": "NVIDIA A100 (sm80)"}, "gpu NVIDIA A100 (sm80)"),
        ({"tensorrt": "HERE"}, "gpu of an unknown version"),
    ],
    ids=["version", "GPU", "unknown GPU"],
)
def test_an_engine_for_something_else_is_refused_with_the_command_that_builds_it(
    pending: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_for: dict[str, str], wrong: str
) -> None:
    version = _here(monkeypatch, "tensorrt-10.16").__version__
    folder = tmp_path / "b"
    shutil.copytree(pending, folder)
    _as_built(folder, {name: value.replace("HERE", version) for name, value in made_for.items()})
    with pytest.raises(BackendError) as caught:
        dfq.load(folder)
    assert caught.value.what == f"`{folder / 'model.engine'}` was made for {wrong}."
    assert caught.value.why.endswith("and an engine runs only where it was made for.")
    assert caught.value.fix.endswith(f"dfq-deploy build {folder}")


def test_without_tensorrt_an_engine_is_not_loaded(pending: Path, tmp_path: Path) -> None:
    shutil.copytree(pending, tmp_path / "b")
    _as_built(tmp_path / "b", {"tensorrt": "10.3.0", "gpu": "NVIDIA L4 (sm89)"})
    with pytest.raises(NotHereError) as caught:
        dfq.load(tmp_path / "b")
    assert (caught.value.what, caught.value.fix) == ("TensorRT is not installed here.", "pip install tensorrt.")
