"""Pictures of every kind become what timm's own dataset and transform make of them, or are refused by name."""

import dataclasses
import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import ImageDataset, create_transform

from calibrators.decoding import MOST_PIXELS, Picture, decoded
from calibrators.errors import ImagesError
from calibrators.preprocess import Preprocess

DEIT = Preprocess((224, 224), 0.9, "center", "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SQUASHED = Preprocess((48, 80), 1.0, "squash", "bilinear", (0.1, 0.2, 0.3), (0.9, 0.8, 0.7))
GREY = Preprocess((28, 28), 1.0, "center", "bilinear", (0.13,), (0.31,))
SIZES = [(1, 1), (2, 300), (248, 250), (400, 300), (33, 32)]  # width, height


def _pixels(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    smooth = np.linspace(0, 230, width * height * channels).reshape(height, width, channels)
    return (smooth + np.random.default_rng(seed).integers(0, 25, smooth.shape)).astype(np.uint8)


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


def _timms(preprocess: Preprocess, content: bytes) -> np.ndarray:
    """What timm's dataset gives of a file with its evaluation transform, as a model's evaluation has it."""
    facts = dataclasses.asdict(preprocess) | {"size": None}
    shape = (len(preprocess.mean), *preprocess.size)
    transform = create_transform(shape, is_training=False, **{k: v for k, v in facts.items() if v})
    mode = "RGB" if len(preprocess.mean) == 3 else "L"
    dataset = ImageDataset("", reader=[(io.BytesIO(content), 0)], transform=transform, input_img_mode=mode)
    found: torch.Tensor = dataset[0][0]
    return found.numpy()


def _palette(width: int, height: int, **transparency: Any) -> bytes:
    return _saved(Image.fromarray(_pixels(width, height)).quantize(32), "PNG", **transparency)


def _deep(width: int, height: int) -> Image.Image:
    """16 bits that go beyond 255, and below it."""
    levels = np.linspace(0, 600, width * height).reshape(height, width).astype(np.uint16)
    return Image.fromarray(levels)


def _turned(width: int, height: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    return _saved(Image.fromarray(_pixels(width, height)), "JPEG", quality=95, exif=exif)


def _animated(kind: str) -> Callable[[int, int], bytes]:
    def made(width: int, height: int) -> bytes:
        frames = [Image.fromarray(_pixels(width, height, seed=seed)).rotate(90 * seed) for seed in range(2)]
        return _saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=40)

    return made


KINDS: dict[str, Callable[[int, int], bytes]] = {
    "RGB PNG": lambda w, h: _saved(Image.fromarray(_pixels(w, h)), "PNG"),
    "JPEG": lambda w, h: _saved(Image.fromarray(_pixels(w, h)), "JPEG"),
    "progressive JPEG": lambda w, h: _saved(Image.fromarray(_pixels(w, h)), "JPEG", progressive=True),
    "RGBA": lambda w, h: _saved(Image.fromarray(_pixels(w, h, 4)), "PNG"),
    "greyscale": lambda w, h: _saved(Image.fromarray(_pixels(w, h)).convert("L"), "PNG"),
    "LA": lambda w, h: _saved(Image.fromarray(_pixels(w, h, 2), "LA"), "PNG"),
    "P": _palette,
    "P with one clear colour": lambda w, h: _palette(w, h, transparency=3),
    "P with alpha": lambda w, h: _palette(w, h, transparency=bytes(range(0, 256, 8))),
    "1 bit": lambda w, h: _saved(Image.fromarray(_pixels(w, h)).convert("1"), "PNG"),
    "16-bit PNG": lambda w, h: _saved(_deep(w, h), "PNG"),
    "16-bit TIFF": lambda w, h: _saved(_deep(w, h), "TIFF"),
    "16-bit PGM": lambda w, h: _saved(_deep(w, h), "PPM"),
    "float TIFF": lambda w, h: _saved(_deep(w, h).convert("F"), "TIFF"),
    "CMYK JPEG": lambda w, h: _saved(Image.fromarray(_pixels(w, h)).convert("CMYK"), "JPEG"),
    "CMYK TIFF": lambda w, h: _saved(Image.fromarray(_pixels(w, h, 4), "CMYK"), "TIFF"),
    "EXIF rotation": _turned,
    "animated GIF": _animated("GIF"),
    "animated PNG": _animated("PNG"),
    "animated WebP": _animated("WEBP"),
    "TIFF of pages": _animated("TIFF"),
}


@pytest.mark.parametrize("preprocess", [DEIT, SQUASHED, GREY], ids=["deit", "squashed", "grey"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.filterwarnings("ignore:'mode' parameter")
def test_every_kind_of_picture_is_what_timm_makes_of_it(kind: str, preprocess: Preprocess, tmp_path: Path) -> None:
    for size in SIZES if preprocess is DEIT else SIZES[::2]:
        content = KINDS[kind](*size)
        (tmp_path / "image").write_bytes(content)
        wanted = _timms(preprocess, content)
        with Image.open(tmp_path / "image") as opened:
            given: list[Picture] = [content, tmp_path / "image", str(tmp_path / "image"), opened]
            for picture in given:
                found = preprocess(picture)
                assert found.dtype == np.float32
                np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6, err_msg=f"{size}, {type(picture)}")


def test_a_rotation_in_exif_is_left_to_whoever_wants_it() -> None:
    lying = decoded(_turned(60, 20), "RGB")
    assert lying.size == (60, 20)
    with Image.open(io.BytesIO(_turned(60, 20))) as image:
        upright = ImageOps.exif_transpose(image)
    assert upright.size == (20, 60)
    np.testing.assert_array_equal(DEIT(upright), DEIT(np.asarray(upright)))


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_an_array_is_the_picture_of_its_values(channels: int | None) -> None:
    pixels = _pixels(37, 20, channels or 1)
    pixels = pixels[..., 0] if channels is None else pixels
    content = _saved(Image.fromarray(pixels[..., 0] if channels == 1 else pixels), "PNG")
    np.testing.assert_array_equal(DEIT(pixels), DEIT(content))
    np.testing.assert_array_equal(DEIT(pixels[::-1, ::2]), DEIT(np.ascontiguousarray(pixels[::-1, ::2])))


def _refused(picture: Any, **limit: int) -> ImagesError:
    with pytest.raises(ImagesError) as caught:
        DEIT(picture, **limit)
    assert len(str(caught.value).splitlines()) == 3
    return caught.value


@pytest.mark.parametrize(
    "array",
    [
        _pixels(9, 9).astype(np.float32),
        _pixels(9, 9).astype(np.uint16),
        _pixels(9, 9) > 99,
        _pixels(9, 9, 2),
        _pixels(9, 9).transpose(2, 0, 1),
        _pixels(9, 9)[None],
        _pixels(9, 9)[:0],
        _pixels(9, 9)[0, 0],
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_an_array_of_another_kind_is_refused(array: np.ndarray) -> None:
    assert "is not a picture" in _refused(array).what


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0, 0.02, 0.6])
@pytest.mark.filterwarnings("ignore")
def test_a_truncated_file_is_refused(kind: str, share: float, tmp_path: Path) -> None:
    share = share / 6 if "animated" in kind or "pages" in kind else share  # which cuts the first frame
    content = KINDS[kind](90, 80)
    path = tmp_path / "cut.png"
    path.write_bytes(content[: int(share * len(content))])
    assert _refused(path).what == f"`{path}` is not a whole image."
    assert _refused(path.read_bytes()).what == "the image is not a whole image."


@pytest.mark.parametrize("picture", [b"", b"GIF89a", b"text", 7, None, [1, 2]], ids=repr)
def test_what_is_no_picture_is_refused(picture: Any) -> None:
    assert "is not a whole image" in _refused(picture).what


@pytest.mark.parametrize(("path", "why"), [("missing.png", "No such file or directory."), (".", "Is a directory.")])
def test_a_path_without_a_file_is_told_as_such(path: str, why: str) -> None:
    error = _refused(path)
    assert (error.what, error.why) == (f"`{path}` cannot be read.", why)


def test_a_picture_that_was_closed_is_refused(tmp_path: Path) -> None:
    Image.fromarray(_pixels(9, 9)).save(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as image:
        pass
    assert f"`{tmp_path / 'image.png'}`" in _refused(image).what


def _png_that_says(width: int, height: int) -> bytes:
    """A PNG whose header names a size, and whose pixels are a few bytes."""
    whole = bytearray(_saved(Image.new("L", (1, 1)), "PNG"))
    whole[16:24] = width.to_bytes(4) + height.to_bytes(4)
    whole[29:33] = zlib.crc32(whole[12:29]).to_bytes(4)
    return bytes(whole)


@pytest.mark.parametrize(("width", "height"), [(8193, 8192), (12000, 12000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_file_that_says_it_is_huge_is_refused_before_it_is_decoded(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = _png_that_says(width, height)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("it was decoded"))
    refusal = _refused(content)
    assert refusal.what == "the image is too large."
    assert str(MOST_PIXELS) in refusal.why


@pytest.mark.parametrize("picture", [_pixels(20, 10), Image.fromarray(_pixels(20, 10)), _turned(20, 10)], ids=type)
def test_the_limit_is_the_caller_s(picture: Picture) -> None:
    wide = Preprocess((8, 8), 1.0, "squash", "nearest", (0.5,) * 3, (0.5,) * 3)
    assert wide(picture, most_pixels=200).shape == (3, 8, 8)
    with pytest.raises(ImagesError, match="too large"):
        wide(picture, most_pixels=199)


def test_a_row_of_pixels_does_not_grow_to_gigabytes() -> None:
    """2 MB that fit the limit; with its shorter edge at 248 pixels the image would have 123 million rows."""
    refusal = _refused(np.zeros((500_000, 1, 3), np.uint8))
    assert refusal.what == "the image, resized for the model, is too large."
    assert DEIT(np.zeros((1000, 1, 3), np.uint8)).shape == DEIT.shape


def test_a_picture_does_not_become_the_input_of_a_model_with_other_channels() -> None:
    prepare = Preprocess((8, 8), 1.0, "center", "bicubic", (0.5,) * 8, (0.5,) * 8)
    with pytest.raises(ImagesError, match="cannot become the model's input") as refused:
        prepare(Image.new("RGB", (8, 8)))
    assert "takes 8" in refused.value.why
    assert "`ImageSet.save`" in refused.value.fix and "npz:" not in refused.value.fix
