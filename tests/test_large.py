"""Models whose weights lie beside the ONNX file, as they do past 2 GiB, and what the stages of a run take."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from PIL import Image

import dfq_deploy as dfq
from calibrators.errors import BundleError
from calibrators.folds import layers_of
from calibrators.images import ImageSet
from calibrators.preprocess import Preprocess
from calibrators.refining import correct, transform
from calibrators.scheme import SCHEMES
from dfq_deploy.formats import FormatsOf
from dfq_deploy.models import Model
from dfq_deploy.recipe import CalibrateRecipe
from dfq_deploy.refined import load_refined, save_refined, shared_copy_of
from dfq_deploy.reporting.checked import read_check
from exporters import to_onnx
from exporters.bundle import open_bundle
from exporters.to_onnx import save_model


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A demo bundle all of whose ONNX files have their weights beside them."""
    folder = tmp_path_factory.mktemp("beside") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "_EXTERNAL_DATA_FROM_BYTES", 0)
        patch.setattr(to_onnx, "_STREAMED_FROM_BYTES", 0)
        found = dfq.export(dfq.Recipe(model="demo", generator="noise", count=8, keep_float=True), folder, limit=100)
    assert found.verdict == "pass"
    yield folder


def _logits(path: Path) -> np.ndarray:
    with dfq.load(path, threads=1) as runner:
        images = np.random.default_rng(0).normal(size=(3, *runner.manifest.preprocess.shape)).astype(np.float32)
        return runner(images)


def test_weights_beside_the_model_are_files_of_the_bundle(beside: Path) -> None:
    manifest = open_bundle(beside)
    for name in ("model.onnx", "float.onnx"):
        assert {name, f"{name}.data"} <= manifest.files.keys()
        assert (beside / name).stat().st_size < (beside / f"{name}.data").stat().st_size
        onnx.checker.check_model(str(beside / name), full_check=True)
        weights = [v.const_value for v in ir.load(beside / name).graph.initializers.values()]
        assert {str(w.location) for w in weights if isinstance(w, ir.ExternalTensor)} == {f"{name}.data"}
    assert list((beside / "work").glob("float-*.onnx.data"))


def test_a_bundle_with_weights_beside_the_model_does_all_that_a_bundle_does(beside: Path, tmp_path: Path) -> None:
    dfq.pack(beside, tmp_path / "bundle.zip")
    np.testing.assert_array_equal(_logits(tmp_path / "bundle.zip"), _logits(beside))
    assert dfq.gate(beside, limit=50).verdict != "fail"
    assert len(dfq.infer(beside, [Image.new("RGB", (40, 30))])) == 1
    assert dfq.bench(beside, batches=(1,), calls=3).paces[0].p50_ms > 0
    assert dfq.check(beside, limit=20).verdict != "fail"
    assert dfq.build(beside).engine.state == "built"


def test_weights_beside_the_model_that_were_altered_are_refused(beside: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(beside, tmp_path / "bundle")
    data = folder / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.onnx\.data` is altered"):
        dfq.load(folder)


def test_a_model_that_was_loaded_from_two_files_can_become_one(beside: Path, tmp_path: Path) -> None:
    save_model(ir.load(beside / "float.onnx"), tmp_path / "float.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["float.onnx"]
    constants = ir.load(tmp_path / "float.onnx").graph.initializers
    for name, value in ir.load(beside / "float.onnx").graph.initializers.items():
        found = constants[name].const_value
        assert value.const_value is not None and found is not None
        np.testing.assert_array_equal(found.numpy(), value.const_value.numpy())


def _noise(preprocess: Preprocess) -> ImageSet:
    pixels = np.random.default_rng(0).normal(size=(4, *preprocess.shape)).astype(np.float32)
    return ImageSet.of(pixels, preprocess, source="noise")


def test_refined_models_have_no_copy_of_what_they_do_not_change(demo: Model, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in demo.module.state_dict().items()}
    images, scheme = _noise(demo.preprocess), SCHEMES["w8a8"]
    folded = shared_copy_of(demo)
    transform(folded.module, images, ["smooth"], scheme, [])
    plan = FormatsOf(CalibrateRecipe(model="demo", spare="none"))(folded, images)
    corrected = shared_copy_of(folded)
    correct(corrected.module, plan.sites, images, ["gptq", "bias"])
    assert all(torch.equal(value, before[name]) for name, value in demo.module.state_dict().items())
    save_refined(tmp_path / "refined.safetensors", demo, corrected)
    back = load_refined(demo, tmp_path / "refined.safetensors").module
    ours = dict(demo.module.named_parameters())
    for name, value in back.named_parameters():
        same = torch.equal(value, before[name])
        assert (value.data_ptr() == ours[name].data_ptr()) == same, name
    changed = {name for name, value in back.named_parameters() if not torch.equal(value, before[name])}
    assert {f"{layer}.weight" for layer in layers_of(back) if layer.startswith("blocks")} <= changed


def test_weights_that_an_earlier_model_left_beside_are_no_file_of_the_bundle(beside: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(beside, tmp_path / "bundle")
    assert "model.onnx.data" in open_bundle(folder).files
    dfq.export(dfq.Recipe(model="demo", scheme="w8a8_asym", generator="noise", count=8, refine="none"), folder, limit=8)
    assert "model.onnx.data" not in open_bundle(folder).files
    assert not (folder / "model.onnx.data").exists()


_STAGES = """
import numpy as np
from dfq_deploy.stage_costs import Measured
from dfq_deploy.watch import SILENT

with Measured(SILENT) as measured:
    measured.stage("before", False)
    measured.stage("much", False)
    np.ones(2**28, np.uint8)  # freed at once
    measured.stage("less", False)
    np.ones(2**26, np.uint8)
    measured.stage("done by an earlier run", True)
    measured.stage("much", False)
for name, cost in measured.costs().items():
    print(name, *cost)
"""


def test_the_peak_of_a_stage_is_its_own() -> None:
    """In a process of its own: what other tests left in this one would count."""
    printed = subprocess.run([sys.executable, "-c", _STAGES], capture_output=True, text=True, check=True).stdout
    costs = {name: (float(seconds), float(peak)) for name, seconds, peak in map(str.split, printed.splitlines())}
    assert list(costs) == ["before", "much", "less"]
    before, much, less = (peak for _, peak in costs.values())
    assert much - before > 200 and much - less > 150
    assert all(seconds >= 0 for seconds, _ in costs.values())


def test_a_check_of_its_own_keeps_what_the_export_took(beside: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(beside, tmp_path / "bundle")
    exported = read_check(folder).stages
    assert list(exported) == ["model", "images", "folded", "ranges", "noise", "refined", "float", "engine", "check"]
    assert all(cost.seconds > 0 and (cost.peak_mib or 0) > 100 for cost in exported.values())
    checked = dfq.check(folder, limit=10)
    assert checked.stages.keys() == exported.keys()
    assert checked.stages["float"] == exported["float"] and checked.stages["check"] != exported["check"]
    told = json.loads((folder / "report.json").read_text())["stages"]["float"]
    assert told == exported["float"]._asdict()
    page = dfq.report(folder, quick=True).path.read_text(encoding="utf-8")
    assert "What it took to make and check" in page and '<th scope="row">refined</th>' in page
