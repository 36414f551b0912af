"""`dfq-deploy build`: the engine of a bundle from elsewhere, made where it will run, with nothing else changed."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pending import export_pending

import dfq_deploy as dfq
from calibrators.errors import BackendError, BundleError, DeployError, ExportError, NotHereError
from calibrators.files import sha256_of
from calibrators.plan import QuantPlan
from dfq_deploy.cli import run
from exporters.backends import rtx, trt
from exporters.bundle import MANIFEST, open_bundle
from exporters.census import Census
from exporters.tensorrt import builder

tensorrt_rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")


@pytest.fixture(scope="module")
def exported(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target") / "bundle"
    export_pending(demo_bundle, folder)
    return folder


@pytest.fixture(autouse=True)
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "trt", None)


@pytest.fixture
def pending(exported: Path, tmp_path: Path) -> Path:
    """A bundle for TensorRT whose engine is pending, and without the stages that made it."""
    shutil.copytree(exported, tmp_path / "bundle", ignore=shutil.ignore_patterns("work"))
    return tmp_path / "bundle"


def _contents(folder: Path) -> dict[str, str]:
    return {file.name: sha256_of(file) for file in folder.iterdir()}


def _report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    facts = json.loads((folder / MANIFEST).read_text())
    change(facts)
    (folder / MANIFEST).write_text(json.dumps(facts))


def test_a_pending_bundle_is_built_by_the_run_time_that_is_there(pending: Path) -> None:
    before, report, files = open_bundle(pending), _report(pending), _contents(pending)
    manifest = dfq.build(pending, backend="rtx")
    assert manifest == open_bundle(pending)
    assert (manifest.backend, manifest.engine.state, manifest.engine.files) == ("rtx", "built", ["model.engine"])
    assert manifest.engine.made_for["tensorrt_rtx"] == tensorrt_rtx.__version__
    assert manifest.engine.precision == before.engine.precision, "what was forecast is what was built"
    assert manifest.files == {**before.files, "model.engine": sha256_of(pending / "model.engine")}
    changed = {name for name, content in _contents(pending).items() if files.get(name) != content}
    assert changed == {"model.engine", MANIFEST, "report.json"}
    told = {"engine": manifest.engine.report(), "reason": "the engine was built after this check: run dfq-deploy check"}
    assert _report(pending) == {**report, **told}
    assert report["verdict"] == "undecided"
    unchanged = {"backend", "engine", "files"}
    assert manifest.model_dump(exclude=unchanged) == before.model_dump(exclude=unchanged)


def test_a_bundle_without_a_report_is_built_as_well(pending: Path) -> None:
    (pending / "report.json").unlink()
    assert dfq.build(pending, backend="rtx").engine.state == "built"
    assert not (pending / "report.json").exists(), "numbers that nobody measured"


@pytest.mark.parametrize("text", ["{", "[]", "7"])
def test_a_damaged_report_is_told_before_anything_is_built(pending: Path, text: str) -> None:
    (pending / "report.json").write_text(text)
    before = _contents(pending)
    with pytest.raises(BundleError, match="is not a whole report") as caught:
        dfq.build(pending, backend="rtx")
    assert "delete it" in caught.value.fix
    assert _contents(pending) == before


def test_an_engine_that_would_not_keep_to_the_plan_does_not_replace_the_one_that_does(
    pending: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dfq.build(pending, backend="rtx")
    before = _contents(pending)

    def falls(*_: object) -> Census:
        raise ExportError(what="a layer is float.", why="so it is.", fix="spare it.")

    monkeypatch.setattr(builder, "census_of", falls)
    with pytest.raises(ExportError, match="a layer is float"):
        dfq.build(pending)
    assert _contents(pending) == before


def test_where_tensorrt_is_missing_it_stays_pending_and_the_exit_code_is_2(
    pending: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = _contents(pending)
    assert run(["build", str(pending)]) == 2
    assert _contents(pending) == before
    assert capfd.readouterr().out.startswith("engine: pending (TensorRT is not installed here;")
    assert run(["build", str(pending), "--backend=rtx"]) == 0
    said = capfd.readouterr().out
    assert said.startswith("engine: built\n")
    assert "layers: 17 in int8, 9 in fp32\n" in said


def test_the_old_engine_is_not_needed_and_does_not_stay(pending: Path) -> None:
    def as_built(facts: dict[str, Any]) -> None:
        names = ["model.engine", "timing.cache"]
        facts["engine"].update(state="built", files=names, made_for={"tensorrt": "10.3.0", "gpu": "an old one"})
        facts["files"].update(dict.fromkeys(names, "0" * 64))

    _rewrite(pending, as_built)
    (pending / "timing.cache").write_bytes(b"of TensorRT, not of RTX")
    with pytest.raises(BundleError, match=r"model\.engine` is missing") as caught:
        dfq.load(pending)
    assert caught.value.fix == f"build the engine again: dfq-deploy build {pending}"
    assert dfq.build(pending, backend="rtx").engine.files == ["model.engine"]
    assert not (pending / "timing.cache").exists()
    before = _contents(pending)
    with pytest.raises(NotHereError, match="the one that it has stays") as caught:
        dfq.build(pending, backend="trt")
    assert "TensorRT is not installed here" in caught.value.why
    assert _contents(pending) == before


def test_timings_that_the_manifest_does_not_record_go_into_no_engine(pending: Path) -> None:
    (pending / "timing-10.3.0-sm89.cache").write_bytes(b"of somebody else")
    dfq.build(pending)
    assert not list(pending.glob("timing-*"))


def test_targets_are_of_the_run_time_that_they_were_named_for(pending: Path) -> None:
    _rewrite(pending, lambda facts: facts.update(backend="rtx"))
    _rewrite(pending, lambda facts: facts["engine"]["options"].update(targets=["sm89"]))
    assert dfq.build(pending, backend="trt").engine.options.targets == ()
    _rewrite(pending, lambda facts: facts.update(backend="rtx"))
    _rewrite(pending, lambda facts: facts["engine"]["options"].update(targets=["sm89"]))
    assert dfq.build(pending).engine.options.targets == ("sm89",)


@pytest.mark.parametrize("name", ["model.onnx", "plan.safetensors"])
def test_what_an_engine_is_made_from_must_be_as_the_manifest_says(pending: Path, name: str) -> None:
    with (pending / name).open("ab") as file:
        file.write(b" ")
    before = _contents(pending)
    with pytest.raises(BundleError, match=rf"{name}` is altered") as caught:
        dfq.build(pending, backend="rtx")
    assert caught.value.fix == "copy the bundle again, whole, or export the model again."
    assert _contents(pending) == before


def test_a_machine_that_knows_less_does_not_unsay_the_forecast(pending: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_bundle(pending).engine
    monkeypatch.setattr(trt, "rtx", None)
    told = _report(pending)
    found = dfq.build(pending).engine
    assert _report(pending) == {**told, "engine": found.report()}, "nothing was built after the check"
    assert (found.state, found.precision, found.kernels) == ("pending", before.precision, before.kernels)
    assert found.note == "TensorRT is not installed here."


@pytest.mark.parametrize("backend", ["rtx", "trt"])
def test_a_bundle_that_was_placed_for_onnx_runtime_is_refused(demo_bundle: Path, tmp_path: Path, backend: str) -> None:
    shutil.copytree(demo_bundle, tmp_path / "b", ignore=shutil.ignore_patterns("work"))
    before = _contents(tmp_path / "b")
    with pytest.raises(BundleError) as caught:
        dfq.build(tmp_path / "b", backend=backend)
    assert caught.value.what == f"the model of `{tmp_path / 'b'}` cannot be built with `{backend}`."
    assert (caught.value.why, caught.value.fix) == (
        "what it quantizes was chosen for `ort`.",
        f"export it again with --backend {backend}.",
    )
    assert _contents(tmp_path / "b") == before
    assert dfq.build(tmp_path / "b").backend == "ort"


def test_onnx_runtime_does_not_take_a_bundle_of_tensorrt(pending: Path) -> None:
    with pytest.raises(BundleError, match="cannot be built with `ort`"):
        dfq.build(pending, backend="ort")


def test_a_run_time_that_does_not_exist_is_refused(pending: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DeployError, match="openvino"):
        dfq.build(pending, backend="openvino")
    assert run(["build", str(pending), "--backend=openvino"]) == 3
    assert capfd.readouterr().err.startswith("error:")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device."),
        (KeyboardInterrupt(), "stopped."),
    ],
    ids=["full disk", "Ctrl-C"],
)
def test_a_build_that_is_cut_off_is_three_lines_and_leaves_the_bundle_as_it_was(
    pending: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: BaseException, said: str
) -> None:
    before, write = _contents(pending), Path.write_bytes

    def cut_off(path: Path, data: bytes) -> int:
        write(path, memoryview(data)[:1000])
        raise error

    monkeypatch.setattr(Path, "write_bytes", cut_off)
    assert run(["build", str(pending), "--backend=rtx"]) == 3
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == f"error: {said}"
    assert [line.split(":")[0] for line in lines] == ["error", "  why", "  fix"]
    assert _contents(pending) == before
    monkeypatch.undo()
    assert dfq.build(pending, backend="rtx").engine.state == "built"


def test_a_layer_that_falls_to_float_is_named_and_the_bundle_stays_pending(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt, "prepare", lambda model, plan, options: None)  # without its fences
    monkeypatch.setattr(trt, "rtx", None)
    export_pending(demo_bundle, tmp_path / "b")
    before = open_bundle(tmp_path / "b")
    assert (before.engine.state, before.engine.precision) == ("pending", {})
    with pytest.raises(ExportError) as caught:
        dfq.build(tmp_path / "b", backend="rtx")
    qkv = ",".join(layer for layer in QuantPlan.load(tmp_path / "b" / "plan.safetensors").layers if "qkv" in layer)
    assert caught.value.fix == f"spare them with --spare auto,{qkv}, or use another backend."
    assert open_bundle(tmp_path / "b") == before


def test_what_the_run_time_cannot_build_is_refused_before_it_is_asked(
    pending: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _rewrite(pending, lambda facts: facts.update(backend="rtx"))
    _rewrite(pending, lambda facts: facts["engine"]["options"].update(targets=["sm90"]))
    monkeypatch.setattr(rtx, "build", lambda *_: pytest.fail("it was asked"))
    with pytest.raises(BackendError, match="builds for no `sm90`"):
        dfq.build(pending)


def test_build_needs_no_torch(pending: Path) -> None:
    absent = ("torch", "timm", "torchvision", "scipy", "onnxscript", "onnxsim", "huggingface_hub")
    script = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({absent}))\n"  # None there makes an import fail
        "from dfq_deploy.cli import run\n"
        "sys.exit(run(['build', sys.argv[1], '--backend', 'rtx']))\n"
    )
    command = [sys.executable, "-c", script, str(pending)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("engine: built\n")
    assert open_bundle(pending).engine.state == "built"
