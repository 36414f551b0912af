"""Images: model-ready as timm makes them, kept with where they come from, and refused when broken."""

import dataclasses
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from timm.data import create_transform

from calibrators.errors import ImagesError
from calibrators.images import ImageSet, is_image_set, joined
from calibrators.preprocess import Preprocess
from calibrators.sources import folder, npz
from calibrators.student import Student
from dfq_deploy.models.loading import load_model

SMALL = Preprocess((8, 8), 0.875, "center", "bicubic", (0.5, 0.4, 0.3), (0.5, 0.2, 0.1))
SIZES = [(1, 1), (7, 300), (224, 224), (248, 248), (249, 250), (500, 375), (227, 640), (33, 32)]  # width, height


def _picture(width: int = 20, height: int = 12, seed: int = 0, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    return Image.fromarray(noise, "RGBA") if mode == "RGBA" else Image.fromarray(noise[..., :3]).convert(mode)


def _pixels(count: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *SMALL.shape), dtype=np.float32)


def _refusal(make: Callable[[], object]) -> ImagesError:
    with pytest.raises(ImagesError) as caught:
        make()
    assert len(str(caught.value).splitlines()) == 3
    return caught.value


# --- Preprocess ---


@functools.cache
def _from_timm(model: str) -> Preprocess:
    return load_model(model, random_weights=True).preprocess


def _timms(preprocess: Preprocess, picture: Image.Image) -> np.ndarray:
    facts = dataclasses.asdict(preprocess) | {"size": None}
    transform = create_transform((3, *preprocess.size), is_training=False, **{k: v for k, v in facts.items() if v})
    transformed: torch.Tensor = transform(picture.convert("RGB"))
    return transformed.numpy()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize(
    ("crop_mode", "crop_pct"), [("center", None), ("squash", None), ("squash", 1.0), ("border", None), ("border", 1.0)]
)
@pytest.mark.parametrize("model", ["vit_t", "deit_t"])
def test_preprocessing_equals_timms(model: str, mode: str, crop_mode: Any, crop_pct: float | None) -> None:
    preprocess = _from_timm(model)
    preprocess = dataclasses.replace(preprocess, crop_mode=crop_mode, crop_pct=crop_pct or preprocess.crop_pct)
    for size in SIZES:
        picture = _picture(*size, mode=mode)
        ours = preprocess(picture)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, _timms(preprocess, picture), rtol=0, atol=1e-6, err_msg=str(size))


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest", "lanczos"])
def test_a_squashed_oblong_input_equals_timms(interpolation: str) -> None:
    preprocess = Preprocess((48, 80), 0.9, "squash", interpolation, (0.1, 0.2, 0.3), (0.9, 0.8, 0.7))
    np.testing.assert_allclose(preprocess(_picture(100, 90)), _timms(preprocess, _picture(100, 90)), rtol=0, atol=1e-6)


def test_the_two_timm_models_differ_in_their_normalisation() -> None:
    vit, deit = _from_timm("vit_t"), _from_timm("deit_t")
    assert (vit.mean, vit.std) == ((0.5,) * 3, (0.5,) * 3)
    assert (deit.mean, deit.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_bounds_are_what_black_and_white_become() -> None:
    black, white = (SMALL(Image.new("RGB", (9, 9), colour)) for colour in ("black", "white"))
    low, high = SMALL.bounds
    np.testing.assert_allclose(black, np.broadcast_to(low, SMALL.shape), rtol=1e-6)
    np.testing.assert_allclose(white, np.broadcast_to(high, SMALL.shape), rtol=1e-6)


@pytest.mark.parametrize(("crop_mode", "size"), [("reflect", (8, 8)), ("center", (0, 8))])
def test_preprocessing_that_is_not_built_is_refused(crop_mode: Any, size: tuple[int, int]) -> None:
    _refusal(lambda: dataclasses.replace(SMALL, crop_mode=crop_mode, size=size))


# --- ImageSet ---


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    ImageSet.of(_pixels(), SMALL, source="test", made_by={"seed": 3}).save(tmp_path / "images.safetensors")
    return tmp_path / "images.safetensors"


@pytest.mark.parametrize("labels", [None, np.array([4, 0, 2, 2, 9])])
def test_an_image_set_comes_back_as_it_was_saved(tmp_path: Path, labels: np.ndarray | None) -> None:
    images = ImageSet.of(_pixels(), SMALL, source="test", labels=labels, made_by={"seed": 3, "loss": [1.5]})
    images.save(tmp_path / "images.safetensors")
    loaded = ImageSet.load(tmp_path / "images.safetensors")
    np.testing.assert_array_equal(np.concatenate(list(loaded.batches(2))), _pixels(), strict=True)
    np.testing.assert_array_equal(loaded.labels, labels)
    for fact in ("preprocess", "source", "fingerprint", "made_by"):
        assert getattr(loaded, fact) == getattr(images, fact)


def test_pixels_that_are_a_view_are_saved_as_seen(tmp_path: Path) -> None:
    view = _pixels()[::-1].transpose(0, 1, 3, 2)
    ImageSet.of(view, SMALL, source="test", labels=np.arange(10)[::2]).save(tmp_path / "images.safetensors")
    loaded = ImageSet.load(tmp_path / "images.safetensors")
    np.testing.assert_array_equal(loaded.pixels[:5], view)
    np.testing.assert_array_equal(loaded.labels, [0, 2, 4, 6, 8])


def test_the_fingerprint_is_that_of_pixels_and_preprocessing() -> None:
    one = ImageSet.of(_pixels(), SMALL, source="one").fingerprint
    moved = _pixels()
    moved[4, 2, 7, 7] = np.nextafter(moved[4, 2, 7, 7], np.float32(9))
    assert ImageSet.of(_pixels(), SMALL, source="other").fingerprint == one
    assert ImageSet.of(moved, SMALL, source="one").fingerprint != one
    assert ImageSet.of(_pixels(), dataclasses.replace(SMALL, crop_pct=1.0), source="one").fingerprint != one


def test_batches_are_whole_but_for_the_last() -> None:
    sizes = [len(batch) for batch in ImageSet.of(_pixels(), SMALL, source="test").batches(2)]
    assert sizes == [2, 2, 1]


def test_spread_picks_evenly_and_keeps_labels_in_step() -> None:
    images = ImageSet.of(_pixels(10), SMALL, source="test", labels=np.arange(10), made_by={"seed": 3})
    picked = images.spread(4)
    np.testing.assert_array_equal(picked.labels, [0, 2, 5, 7])
    np.testing.assert_array_equal(picked.pixels[:4], _pixels(10)[[0, 2, 5, 7]])
    assert (picked.source, picked.made_by) == ("4 of test", {"seed": 3})
    assert picked.fingerprint != images.fingerprint
    assert images.spread(10) is images.spread(11) is images


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_image_with_nan_or_inf_is_refused_by_its_number(bad: float) -> None:
    pixels = _pixels(40)
    pixels[37, 1, 2, 3] = bad
    assert "image 37" in _refusal(lambda: ImageSet.of(pixels, SMALL, source="test")).what


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 8, 9), (2, 1, 8, 8), (3, 8, 8)])
def test_no_images_and_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    _refusal(lambda: ImageSet.of(np.zeros(shape, np.float32), SMALL, source="test"))


def test_a_pixel_that_was_altered_in_the_file_is_noticed(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[-1] ^= 1
    saved.write_bytes(content)
    assert "other images" in _refusal(lambda: ImageSet.load(saved)).what


@pytest.mark.parametrize("kept", [0, 7, 200, -1])
def test_a_truncated_file_is_no_image_set(saved: Path, kept: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    _refusal(lambda: ImageSet.load(saved))
    assert not is_image_set(saved)


def test_a_missing_file_and_a_folder_are_no_image_set(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        _refusal(lambda path=path: ImageSet.load(path))
        assert not is_image_set(path)


@pytest.mark.parametrize(
    "header",
    [
        {"dfq_plan": "{}"},
        {"dfq_imageset": "{"},
        {"dfq_imageset": json.dumps({"format": 2})},
        {"dfq_imageset": json.dumps({"format": 1, "preprocess": {"size": 8}})},
    ],
)
def test_another_safetensors_file_is_no_image_set(tmp_path: Path, header: dict[str, str]) -> None:
    save_file({"pixels": _pixels()}, tmp_path / "other", header)
    _refusal(lambda: ImageSet.load(tmp_path / "other"))
    assert is_image_set(tmp_path / "other") == ("dfq_imageset" in header)


# --- folder:PATH ---


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in reversed(range(3)):
        _picture(seed=number).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def _listing(folder_path: Path, *lines: str) -> None:
    (folder_path / "labels.csv").write_text("\n".join(lines))


def test_a_folder_gives_its_images_in_the_order_of_their_names(pictures: Path) -> None:
    images = folder.open_images(pictures, SMALL)
    expected = np.stack([SMALL(_picture(seed=number)) for number in range(3)])
    np.testing.assert_array_equal(np.concatenate(list(images.batches(2))), expected, strict=True)
    assert (images.labels, images.source) == (None, f"folder:{pictures.name}")


def test_class_folders_give_labels_in_sorted_order(tmp_path: Path) -> None:
    for name in ("dog/b.png", "dog/a.png", "cat/z.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        _picture().save(tmp_path / name)
    np.testing.assert_array_equal(folder.open_images(tmp_path, SMALL).labels, np.array([0, 1, 1]), strict=True)


def test_a_class_folder_without_images_has_its_index(tmp_path: Path) -> None:
    for name in (".trash", "ant", "bee", "cat", "dog"):
        (tmp_path / name).mkdir()
    (tmp_path / "bee" / "notes.txt").write_text("no image")
    for name in ("cat/z.jpeg", "dog/a.png"):
        _picture().save(tmp_path / name)
    images = folder.open_images(tmp_path, SMALL)
    np.testing.assert_array_equal(images.labels, np.array([2, 3]), strict=True)
    assert images.classes == images.spread(1).classes == ("ant", "bee", "cat", "dog")
    assert images.spread(1).names == ("cat/z.jpeg",)
    _picture().save(tmp_path / "unlabelled.png")
    assert folder.open_images(tmp_path, SMALL).classes is None


def test_a_listing_gives_labels_and_order(pictures: Path) -> None:
    _listing(pictures, "file,label", "2.png,7", "0.png,1")
    images = folder.open_images(pictures, SMALL)
    np.testing.assert_array_equal(images.labels, np.array([7, 1]), strict=True)
    np.testing.assert_array_equal(images.pixels[:1], [SMALL(_picture(seed=2))])


def test_the_fingerprint_of_a_folder_changes_with_bytes_labels_and_preprocessing(pictures: Path) -> None:
    found = [folder.open_images(pictures, SMALL).fingerprint]
    found.append(folder.open_images(pictures, dataclasses.replace(SMALL, crop_pct=1.0)).fingerprint)
    for label in (0, 1):
        _listing(pictures, "file,label", "0.png,0", f"1.png,{label}", "2.png,0")
        found.append(folder.open_images(pictures, SMALL).fingerprint)
    _picture(seed=9).save(pictures / "2.png")
    found.append(folder.open_images(pictures, SMALL).fingerprint)
    assert len(set(found)) == len(found)


def test_opening_a_folder_decodes_nothing(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    really_open = Image.open
    monkeypatch.setattr(Image, "open", lambda path, **_: opened.append(path) or really_open(path))
    images = folder.open_images(pictures, SMALL)
    assert opened == []
    images.pixels[1:2]
    assert opened == [pictures / "1.png"]


@pytest.mark.parametrize(
    "lines",
    [
        ["0.png,1"],
        ["file;label", "0.png;1"],
        ["name,label", "0.png,1"],
        ["file,label", "0.png"],
        ["file,label", "0.png,cat"],
        ["file,label", "0.png,1.5"],
        ["file,label", "0.png,99999999999999999999"],
        ["file,label", "/etc/hostname,1"],
        ["file,label", "0.png,\xff\0"],
        ["file,label"],
        ["file,label", '"0.png,1', *["1.png,2"] * 20_000],
    ],
)
def test_a_malformed_listing_is_refused(pictures: Path, lines: list[str]) -> None:
    (pictures / "labels.csv").write_bytes("\n".join(lines).encode("latin-1"))
    _refusal(lambda: folder.open_images(pictures, SMALL))


def test_a_listing_of_a_spreadsheet_may_begin_with_a_mark(pictures: Path) -> None:
    (pictures / "labels.csv").write_text("file,label\n0.png,1\n", encoding="utf-8-sig")
    (pictures / "folder.png").mkdir()
    assert folder.open_images(pictures, SMALL).names == ("0.png",)
    (pictures / "labels.csv").unlink()
    assert "folder.png" not in (folder.open_images(pictures, SMALL).names or ())


def test_a_listed_file_that_is_missing_is_named(pictures: Path) -> None:
    _listing(pictures, "file,label", "0.png,1", "8.png,1", "9.png,1")
    refusal = _refusal(lambda: folder.open_images(pictures, SMALL))
    assert "8.png" in refusal.what
    assert "1 more" in refusal.why


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif", "ppm"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5])
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_a_truncated_image_is_refused_by_name_when_it_is_read(tmp_path: Path, suffix: str, share: float) -> None:
    broken = tmp_path / f"broken.{suffix}"
    _picture(60, 50).save(broken)
    content = broken.read_bytes()
    broken.write_bytes(content[: int(share * len(content))])
    images = folder.open_images(tmp_path, SMALL)
    assert broken.name in _refusal(lambda: images.pixels[:1]).what


def test_a_folder_without_images_and_one_that_is_missing_are_refused(tmp_path: Path) -> None:
    assert "holds no images" in _refusal(lambda: folder.open_images(tmp_path, SMALL)).what
    assert "no folder" in _refusal(lambda: folder.open_images(tmp_path / "none", SMALL)).what


# --- npz:PATH ---

GREY = np.random.default_rng(0).integers(0, 256, (6, 9, 9), np.uint8)


def _archive(path: Path, **arrays: np.ndarray) -> Path:
    np.savez_compressed(path / "images.npz", **arrays)
    return path / "images.npz"


@pytest.mark.parametrize("raw", [GREY, np.stack([GREY, GREY // 2, 255 - GREY], -1)], ids=["grey", "rgb"])
def test_an_archive_gives_its_images_and_labels(tmp_path: Path, raw: np.ndarray) -> None:
    images = npz.open_images(_archive(tmp_path, images=raw, labels=np.arange(6, dtype=np.uint8)), SMALL)
    expected = np.stack([SMALL(Image.fromarray(image)) for image in raw])
    np.testing.assert_array_equal(np.concatenate(list(images.batches(4))), expected, strict=True)
    np.testing.assert_array_equal(images.labels, np.arange(6), strict=True)


def test_an_archive_without_labels_has_none(tmp_path: Path) -> None:
    assert npz.open_images(_archive(tmp_path, images=GREY), SMALL).labels is None


@pytest.mark.parametrize(
    "arrays",
    [
        {"pictures": GREY},
        {"images": GREY.astype(np.float32)},
        {"images": GREY[0]},
        {"images": GREY[:0]},
        {"images": GREY[..., None]},
        {"images": GREY, "labels": np.arange(5)},
        {"images": GREY, "labels": np.arange(6) + 0.5},
        {"images": GREY, "labels": np.array(["cat"] * 6)},
        {"images": GREY, "labels": np.array([object()] * 6)},
    ],
    ids=lambda arrays: ", ".join(f"{name} {array.dtype}{array.shape}" for name, array in arrays.items()),
)
def test_an_archive_of_something_else_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    _refusal(lambda: npz.open_images(_archive(tmp_path, **arrays), SMALL))


@pytest.mark.parametrize("kept", [0, 10, 200, -10])
def test_a_truncated_archive_is_refused(tmp_path: Path, kept: int) -> None:
    path = _archive(tmp_path, images=GREY)
    path.write_bytes(path.read_bytes()[:kept])
    _refusal(lambda: npz.open_images(path, SMALL))


def test_an_archive_with_damaged_bytes_is_refused(tmp_path: Path) -> None:
    path = _archive(tmp_path, images=GREY)
    content = bytearray(path.read_bytes())
    content[100:200] = bytes(100)
    path.write_bytes(content)
    _refusal(lambda: npz.open_images(path, SMALL))


def test_a_bare_array_and_a_missing_file_are_no_archive(tmp_path: Path) -> None:
    bare = io.BytesIO()
    np.save(bare, GREY)
    (tmp_path / "bare.npz").write_bytes(bare.getvalue())
    for name in ("bare.npz", "missing.npz"):
        assert name in _refusal(lambda name=name: npz.open_images(tmp_path / name, SMALL)).what


def test_sets_are_joined_in_their_order() -> None:
    pixels = _pixels()
    parts = [ImageSet.of(part, SMALL, source=source) for part, source in ((pixels[:2], "one"), (pixels[2:], "other"))]
    whole = joined(parts)
    assert whole.fingerprint == ImageSet.of(pixels, SMALL, source="all").fingerprint
    assert whole.source == "one and other"


@pytest.mark.parametrize("order", ["aa", "aba"])
def test_the_same_images_twice_are_not_joined(order: str) -> None:
    sets = {name: ImageSet.of(_pixels(seed=seed), SMALL, source=name) for seed, name in enumerate("ab")}
    refusal = _refusal(lambda: joined([sets[name] for name in order]))
    assert refusal.what == f"set {len(order)} of {len(order)} that are joined (a) was there before."


def test_a_set_with_a_student_is_not_joined() -> None:
    student = Student({"weight": np.ones(3, np.float32)}, "model", "w8a8")
    taught = ImageSet.of(_pixels(), SMALL, source="taught", student=student)
    with pytest.raises(ImagesError, match="with a student cannot be joined"):
        joined([taught, ImageSet.of(_pixels(), SMALL, source="other")])
