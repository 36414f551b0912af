"""Images for other people's tools: what they read is what we have, and a file is whole or not there."""

import dataclasses
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnxruntime.quantization import CalibrationMethod, QuantType, create_calibrator, quantize_static
from PIL import Image
from polygraphy.json import load_json, to_json
from small_model import Failing

from calibrators import interchange
from calibrators.errors import DeployError, ImagesError, RecipeError
from calibrators.images import ImageSet
from calibrators.interchange import ImageSetReader, write_folder, write_npz, write_polygraphy
from calibrators.preprocess import Preprocess
from calibrators.sources import folder

RGB = Preprocess((6, 6), 1.0, "center", "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = Preprocess((5, 7), 1.0, "squash", "bilinear", (0.5,), (0.25,))


def _pictures(preprocess: Preprocess, count: int = 5) -> ImageSet:
    """Real pictures: their pixels are 8-bit."""
    rng = np.random.default_rng(0)
    shape = (count, *preprocess.size) if len(preprocess.mean) == 1 else (count, *preprocess.size, 3)
    raw = rng.integers(0, 256, shape, np.uint8)
    pixels = np.stack([preprocess(Image.fromarray(picture)) for picture in raw])
    return ImageSet.of(pixels, preprocess, source="test", labels=np.arange(count, dtype=np.int64) * 3)


def _failing() -> ImageSet:
    """A set whose last image cannot be read."""
    images = _pictures(RGB, 20)
    failure = ImagesError(what="image 19 is broken.", why="a test.", fix="none.")
    return dataclasses.replace(images, pixels=Failing(np.array(images.pixels[:20]), failure))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A convolution over `images`."""
    weight = np.random.default_rng(1).normal(size=(2, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["images", "weight"], ["logits"], "conv")],
        "test",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 6, 6])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2, 4, 4])],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_the_reader_gives_every_image_once_and_again_after_rewind(size: int) -> None:
    images = _pictures(RGB)
    reader = ImageSetReader(images, input_name="x", batch_size=size)
    for _ in range(2):
        batches = list(reader)
        assert len(batches) == len(reader)
        assert {tuple(batch) for batch in batches} == {("x",)}
        np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in batches]), images.pixels[:5])
        assert reader.get_next() is None
        reader.rewind()


def test_onnxruntimes_own_pipeline_calibrates_on_an_image_set(tmp_path: Path, model: Path) -> None:
    images = _pictures(RGB)
    quantize_static(
        model,
        tmp_path / "static.onnx",
        ImageSetReader(images, batch_size=2),
        activation_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "CalibStridedMinMax": 1},
    )
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(tmp_path / "static.onnx").graph.initializer}
    largest = np.abs(images.pixels[:5]).max()
    assert float(stored["images_scale"]) == pytest.approx(largest / 127, rel=1e-6)


def test_a_reader_that_fails_fails_the_calibration(tmp_path: Path, model: Path) -> None:
    calibrator = create_calibrator(model, None, str(tmp_path / "a.onnx"), CalibrationMethod.MinMax)
    with pytest.raises(ImagesError, match="image 19 is broken"):
        calibrator.collect_data(ImageSetReader(_failing()))


@pytest.mark.parametrize("labelled", [True, False])
def test_an_archive_holds_the_pixels_bit_for_bit(tmp_path: Path, labelled: bool) -> None:
    images = _pictures(RGB, 35) if labelled else dataclasses.replace(_pictures(RGB, 35), labels=None)
    write_npz(images, tmp_path / "a.npz")
    write_npz(images, tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert set(archive) == ({"images", "labels"} if labelled else {"images"})
        np.testing.assert_array_equal(archive["images"], images.pixels[:35], strict=True)
        if labelled:
            np.testing.assert_array_equal(archive["labels"], images.labels, strict=True)


class _Zeros:
    """Many images that take no memory until they are read."""

    def __len__(self) -> int:
        return 500

    def __getitem__(self, index: slice) -> np.ndarray:
        return np.zeros((len(range(*index.indices(500))), 3, 128, 128), np.float32)


def test_a_large_set_is_never_held_whole(tmp_path: Path) -> None:
    preprocess = dataclasses.replace(RGB, size=(128, 128))
    images = ImageSet(_Zeros(), preprocess, "test", "f" * 64)
    tracemalloc.start()
    write_npz(images, tmp_path / "large.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "large.npz").stat().st_size > 90 * 2**20
    assert peak < 20 * 2**20


@pytest.mark.parametrize("preprocess", [RGB, GREY], ids=["rgb", "grey"])
def test_pictures_come_back_from_a_folder_bit_for_bit(tmp_path: Path, preprocess: Preprocess) -> None:
    images = _pictures(preprocess, 11)
    write_folder(images, tmp_path / "out" / "pictures")
    assert sorted(p.name for p in (tmp_path / "out" / "pictures").iterdir())[:2] == ["00.png", "01.png"]
    again = folder.open_images(tmp_path / "out" / "pictures", preprocess)
    np.testing.assert_array_equal(again.pixels[:11], images.pixels[:11], strict=True)
    np.testing.assert_array_equal(again.labels, images.labels, strict=True)


def test_synthetic_images_in_a_folder_are_rounded_to_eight_bits_and_clipped(tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).normal(0, 1.5, (4, 3, 6, 6)).astype(np.float32)
    write_folder(ImageSet.of(pixels, RGB, source="test"), tmp_path / "noise")
    assert not (tmp_path / "noise" / "labels.csv").exists()
    again = folder.open_images(tmp_path / "noise", RGB)
    assert again.labels is None
    black, white = RGB.bounds
    step = np.asarray(RGB.std, np.float32).reshape(-1, 1, 1)
    assert (np.abs(again.pixels[:4] - np.clip(pixels, black, white)) <= 0.5001 / 255 / step).all()


def test_a_folder_is_not_written_into_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ImagesError, match="is there already"):
        write_folder(_pictures(RGB), tmp_path)


def test_polygraphys_file_is_read_by_polygraphy(tmp_path: Path, model: Path) -> None:
    images = _pictures(RGB)
    write_polygraphy(images, tmp_path / "inputs.json", batch_size=2)
    loaded = load_json(str(tmp_path / "inputs.json"))
    assert [list(feed) for feed in loaded] == [["images"]] * 3
    np.testing.assert_array_equal(np.concatenate([feed["images"] for feed in loaded]), images.pixels[:5], strict=True)
    assert to_json(loaded[0]) in (tmp_path / "inputs.json").read_text()
    tool = [sys.executable, "-c", "from polygraphy.tools import main; raise SystemExit(main())"]
    arguments = ["run", model, "--onnxrt", "--load-inputs", tmp_path / "inputs.json", "--save-outputs"]
    ran = subprocess.run([*tool, *map(str, arguments), str(tmp_path / "outputs.json")], capture_output=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (tmp_path / "outputs.json").is_file()


def test_without_polygraphy_the_fix_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interchange, "polygraphy_json", None)
    with pytest.raises(RecipeError, match="cannot be written") as caught:
        write_polygraphy(_pictures(RGB), tmp_path / "inputs.json")
    assert caught.value.fix == "pip install polygraphy."


@pytest.mark.parametrize("write", [write_npz, write_folder, write_polygraphy])
def test_a_source_that_fails_leaves_nothing_behind(tmp_path: Path, write: Any) -> None:
    with pytest.raises(DeployError, match="image 19 is broken"):
        write(_failing(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
