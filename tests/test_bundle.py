"""The bundle is whole or refused, and what runs it gives the engine's own numbers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

import dfq_deploy as dfq
from calibrators.errors import BundleError, ImagesError
from exporters.bundle import MANIFEST, open_bundle, seal_bundle


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the demo bundle that may be damaged."""
    folder = tmp_path / "bundle"
    shutil.copytree(demo_bundle, folder, ignore=shutil.ignore_patterns("work"))
    return folder


def _rewrite(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    facts = json.loads((bundle / MANIFEST).read_text())
    change(facts)
    (bundle / MANIFEST).write_text(json.dumps(facts))


def _digit() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24, 3), np.uint8))


def test_a_manifest_comes_back_as_it_was_sealed(bundle: Path) -> None:
    manifest = open_bundle(bundle)
    (bundle / MANIFEST).unlink()
    seal_bundle(bundle, manifest, list(manifest.files))
    assert open_bundle(bundle) == manifest


def test_the_manifest_says_what_made_the_bundle(bundle: Path) -> None:
    manifest = open_bundle(bundle)
    assert (manifest.format, manifest.model.name, manifest.backend, manifest.scheme) == (1, "demo", "ort", "w8a8")
    assert manifest.recipe["generator"] == "noise"
    assert manifest.images["source"] == "synthetic:noise"
    assert manifest.float_parity < 1e-5
    assert manifest.versions["onnxruntime"] == onnxruntime.__version__
    assert set(manifest.files) == {"model.onnx", "plan.safetensors", "classes.txt"}


def test_a_bundle_may_be_moved_without_its_work_folder_and_report(bundle: Path) -> None:
    (bundle / "report.json").unlink()
    moved = bundle.rename(bundle.with_name("elsewhere"))
    with dfq.load(moved) as runner:
        assert runner(runner.preprocess(_digit())).shape == (1, 10)


@pytest.mark.parametrize("name", ["model.onnx", "plan.safetensors", "classes.txt"])
def test_an_altered_file_is_refused_by_its_name(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name}` is altered"):
        dfq.load(bundle)


@pytest.mark.parametrize("name", ["model.onnx", "plan.safetensors", "classes.txt"])
def test_a_missing_file_is_refused_by_its_name(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=rf"{name}` is missing"):
        dfq.load(bundle)


_FUTURE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a format": (lambda facts: facts.update(format=2), "format 2"),
    "a format and fields": (lambda facts: facts.update(format=3, files=["model.onnx"]), "format 3"),
    "a field": (lambda facts: facts.update(licence="MIT"), "`licence`"),
    "a nested field": (lambda facts: facts["model"].update(author="me"), "`model.author`"),
    "an option": (lambda facts: facts["engine"]["options"].update(streams=2), "`engine.options.streams`"),
    "a step before the model": (lambda facts: facts["preprocess"].update(gamma=2.2), "`preprocess.gamma`"),
}
_DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a format of the past": lambda facts: facts.update(format=0),
    "a format in words": lambda facts: facts.update(format="1"),
    "a field too few": lambda facts: facts.pop("scheme"),
    "a wrong type": lambda facts: facts["model"].update(classes="ten"),
    "an unknown precision": lambda facts: facts["engine"]["precision"].update({"blocks.0.attn.qkv": "int3"}),
    "an unknown state": lambda facts: facts["engine"].update(state="half built"),
    "an unknown body": lambda facts: facts["engine"]["options"].update(body="fp64"),
    "an engine outside": lambda facts: facts["engine"].update(files=["../model.engine"]),
    "a path up": lambda facts: facts["files"].update({"../x": "0" * 64}),
    "a path down": lambda facts: facts["files"].update({"work/x": "0" * 64}),
    "an absolute path": lambda facts: facts["files"].update({"/etc/passwd": "0" * 64}),
    "a hidden file": lambda facts: facts["files"].update({".x": "0" * 64}),
    "no hash": lambda facts: facts["files"].update({"model.onnx": ""}),
    "a crop that is not built": lambda facts: facts["preprocess"].update(crop_mode="reflect"),
    "an edge without pixels": lambda facts: facts["preprocess"].update(size=[0, 0]),
    "an edge of too many": lambda facts: facts["preprocess"].update(crop_pct=1e-9),
    "a deviation of zero": lambda facts: facts["preprocess"].update(std=[0, 1, 1]),
    "no channels": lambda facts: facts["preprocess"].update(mean=[], std=[]),
    "a mean for each of two channels and one deviation": lambda facts: facts["preprocess"].update(mean=[0, 0], std=[1]),
    "an unknown resampling": lambda facts: facts["preprocess"].update(interpolation="magic"),
    "a batch of none": lambda facts: facts["engine"]["options"].update(batch=[0, 8, 32]),
    "batches in no order": lambda facts: facts["engine"]["options"].update(batch=[8, 1, 32]),
    "no images": lambda facts: facts.update(images={}),
    "a recipe without images": lambda facts: facts["recipe"].pop("calib"),
    "a terminal's escape": lambda facts: facts["model"].update(name="demo\x1b[2J"),
}


@pytest.mark.parametrize("kind", _FUTURE)
def test_a_manifest_from_the_future_is_told_with_the_remedy(bundle: Path, kind: str) -> None:
    change, named = _FUTURE[kind]
    _rewrite(bundle, change)
    with pytest.raises(BundleError, match="seems to be of a later version") as caught:
        open_bundle(bundle)
    assert named in caught.value.why
    assert "upgrade dfq-deploy" in caught.value.fix


@pytest.mark.parametrize("damage", _DAMAGE)
def test_a_manifest_of_another_kind_is_refused(bundle: Path, damage: str) -> None:
    _rewrite(bundle, _DAMAGE[damage])
    with pytest.raises(BundleError, match="cannot be read as a manifest of format 1"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["model.onnx", "plan.safetensors"])
def test_a_manifest_must_name_what_every_bundle_holds(bundle: Path, name: str) -> None:
    _rewrite(bundle, lambda facts: facts["files"].pop(name))
    with pytest.raises(BundleError, match=name):
        dfq.load(bundle)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", None], ids=repr)
def test_a_manifest_that_is_cut_off_or_no_json_is_refused(bundle: Path, content: bytes | None) -> None:
    whole = (bundle / MANIFEST).read_bytes()
    (bundle / MANIFEST).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(BundleError, match="cannot be read as a manifest"):
        open_bundle(bundle)


def test_a_folder_without_a_manifest_is_no_bundle(bundle: Path, tmp_path: Path) -> None:
    (bundle / MANIFEST).unlink()
    for folder in (bundle, tmp_path / "nowhere"):
        with pytest.raises(BundleError, match="is not a bundle"):
            dfq.load(folder)


def test_a_bundle_holds_no_pickle(bundle: Path) -> None:
    names = {file.name for file in bundle.iterdir()}
    assert names == {MANIFEST, "model.onnx", "plan.safetensors", "classes.txt", "recipe.toml", "report.json"}


def test_the_runner_preprocesses_and_computes_as_the_engine_does(bundle: Path) -> None:
    image = _digit()
    session = onnxruntime.InferenceSession(str(bundle / "model.onnx"))
    pixels = open_bundle(bundle).preprocess(image)[None]
    with dfq.load(bundle) as runner:
        found = runner.preprocess([image])
        np.testing.assert_array_equal(found, pixels)
        np.testing.assert_array_equal(runner.preprocess(image), found)
        np.testing.assert_array_equal(runner(found), session.run(None, {"images": pixels})[0])
        assert runner(found).dtype == np.float32
        assert runner.classes == [str(digit) for digit in range(10)]


def test_the_runner_answers_each_image_of_a_batch_as_it_answers_it_alone(bundle: Path) -> None:
    with dfq.load(bundle) as runner:
        images = runner.preprocess([_digit(), _digit().rotate(90), _digit().rotate(180)])
        alone = np.concatenate([runner(image[None]) for image in images])
        np.testing.assert_allclose(runner(images), alone, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 3, 32, 31), (1, 1, 32, 32), (2, 32, 32, 3), (1, 3, 32, 32, 1)])
def test_images_of_another_shape_are_refused(bundle: Path, shape: tuple[int, ...]) -> None:
    with dfq.load(bundle) as runner, pytest.raises(ImagesError, match="do not fit the model"):
        runner(np.zeros(shape, np.float32))
