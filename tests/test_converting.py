"""`dfq-deploy convert`: what a bundle holds, in the formats of other tools, and what cannot be."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from onnxruntime.quantization import QuantType, quantize_static

import dfq_deploy as dfq
from calibrators.calibration_cache import read_cache
from calibrators.errors import DeployError
from calibrators.plan import QuantPlan, make_plan
from calibrators.scheme import SCHEMES
from calibrators.sources import folder
from calibrators.tensors import tensors_of
from dfq_deploy.cli import run


@pytest.fixture
def kept(demo_bundle: Path, tmp_path: Path) -> Path:
    """A folder with a demo bundle's images, plan and float model."""
    for kind, suffix in (("images", "safetensors"), ("float", "onnx")):
        (found,) = (demo_bundle / "work").glob(f"{kind}-*.{suffix}")
        shutil.copy(found, tmp_path / f"{kind}.{suffix}")
    shutil.copy(demo_bundle / "plan.safetensors", tmp_path / "plan.safetensors")
    return tmp_path


@pytest.mark.parametrize("to", ["npz", "folder", "polygraphy"])
def test_images_are_written_in_each_format(kept: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = kept / "out" / to
    assert run(["convert", str(kept / "images.safetensors"), "--to", to, "--out", str(out)]) == 0
    assert f"as {to}" in capsys.readouterr().out
    images = dfq.ImageSet.load(kept / "images.safetensors")
    if to == "folder":
        assert len(folder.open_images(out, images.preprocess)) == len(images) == len(list(out.iterdir()))
    elif to == "npz":
        with np.load(out) as archive:
            np.testing.assert_array_equal(archive["images"], images.pixels[: len(images)])
    else:
        assert out.read_text().count('"images"') == len(images)


def test_a_demo_plan_survives_tensorrts_cache_with_every_scale(kept: Path) -> None:
    arguments = ["--to", "cache", "--onnx", str(kept / "float.onnx"), "--tensorrt", "10.3.0"]
    assert run(["convert", str(kept / "plan.safetensors"), *arguments, "--out", str(kept / "plan.cache")]) == 0
    assert (kept / "plan.cache").read_text().startswith("TRT-100300-EntropyCalibration2\n")
    plan = QuantPlan.load(kept / "plan.safetensors")
    tensors = tensors_of(plan.sites, kept / "float.onnx")
    again = make_plan(read_cache(kept / "plan.cache", tensors, model=plan.model, images="i"), SCHEMES["w8a8"])
    assert again.layers == plan.layers and len(again.sites) == 16
    for site, qparams in again.sites.items():
        np.testing.assert_array_equal(qparams.scale, plan.sites[site].scale, strict=True)


def test_the_reader_is_public_and_feeds_onnxruntime(kept: Path) -> None:
    reader = dfq.ImageSetReader(dfq.ImageSet.load(kept / "images.safetensors"))
    quantize_static(kept / "float.onnx", kept / "static.onnx", reader, activation_type=QuantType.QInt8)
    assert (kept / "static.onnx").stat().st_size < (kept / "float.onnx").stat().st_size


@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        ("plan.safetensors", ["--to", "npz"]),
        ("images.safetensors", ["--to", "cache"]),
        ("images.safetensors", ["--to", "npz", "--tensorrt", "10.3.0"]),
        ("plan.safetensors", ["--to", "cache", "--tensorrt", "ten"]),
        ("plan.safetensors", ["--to", "cache", "--onnx", "images.safetensors"]),
        ("plan.safetensors", ["--to", "jpeg"]),
        ("nothing", ["--to", "folder"]),
    ],
)
def test_what_cannot_be_converted_is_told_in_three_lines_and_leaves_nothing(
    kept: Path, file: str, arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(kept)
    before = sorted(kept.iterdir())
    assert run(["convert", file, *arguments, "--out", "out"]) == 3
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0].strip() for line in said] == ["error", "why", "fix"]
    assert sorted(kept.iterdir()) == before


def test_an_asymmetric_plan_is_no_cache(kept: Path) -> None:
    recipe = dfq.Recipe(model="demo", calib=str(kept / "images.safetensors"), scheme="w8a8_asym")
    dfq.calibrate(recipe, kept / "asym.safetensors")
    with pytest.raises(DeployError, match="is not symmetric INT8"):
        dfq.convert(kept / "asym.safetensors", kept / "asym.cache", to="cache")
