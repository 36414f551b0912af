"""What a check records of images on which the engine decides otherwise: which, in what order, and their pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calibrators.files import sha256_of
from calibrators.images import ImageSet
from calibrators.pictures import contact_sheet, pictures_on
from calibrators.preprocess import Preprocess
from calibrators.sources.folder import open_images
from dfq_deploy.disagreements import DISAGREEMENTS, disagreements, draw_disagreements


def _logits(best: list[int], classes: int = 4) -> np.ndarray:
    return 3.0 * np.eye(classes)[best]


def _set(tmp_path: Path, labels: list[int]) -> ImageSet:
    """A folder of images of one grey each, that of image i being 20 i."""
    rows = ["file,label"]
    for number, label in enumerate(labels):
        Image.new("RGB", (6, 6), (20 * number,) * 3).save(tmp_path / f"<b>{number}.png")
        rows.append(f"<b>{number}.png,{label}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    return open_images(tmp_path, Preprocess((6, 6), 1.0, "center", "bicubic", (0.5,) * 3, (0.5,) * 3))


def test_disagreements_come_with_names_and_those_that_lost_their_class_first(tmp_path: Path) -> None:
    images = _set(tmp_path, [0, 1, 2, 3, 0])
    floats = _logits([0, 0, 2, 3, 1])
    floats[4] *= 2  # the surest
    logits = {"float": floats, "reference": _logits([0, 1, 2, 2, 1]), "engine": _logits([0, 1, 2, 2, 0])}
    count, shown = disagreements(logits, images)
    assert count == 3
    assert [one.image for one in shown] == [3, 4, 1]
    assert (shown[0].name, shown[0].label) == ("<b>3.png", 3)
    assert [shown[0].float.index, shown[0].reference.index, shown[0].engine.index] == [3, 2, 2]
    assert 85 < shown[0].float.percent < shown[1].float.percent
    few = images.spread(2)
    assert few.names == ("<b>0.png", "<b>2.png")
    assert few.fingerprint == ImageSet.of(few.pixels, few.preprocess, source="", labels=few.labels).fingerprint


def test_the_sheet_has_their_pictures_in_order_and_is_gone_with_them(tmp_path: Path) -> None:
    images = _set(tmp_path, [0, 1, 2])
    logits = {"float": _logits([0, 1, 2]), "reference": _logits([0, 1, 2]), "engine": _logits([0, 0, 0])}
    _, shown = disagreements(logits, images)
    assert draw_disagreements(shown, images, tmp_path) == sha256_of(tmp_path / DISAGREEMENTS)
    with Image.open(tmp_path / DISAGREEMENTS) as sheet:
        cells = pictures_on(sheet, 2, (6, 6))
    assert [cell.getpixel((3, 3))[0] for cell in cells] == [20 * one.image for one in shown]  # type: ignore[index]
    assert draw_disagreements((), images, tmp_path) == ""
    assert not (tmp_path / DISAGREEMENTS).exists()


@pytest.mark.parametrize("count", [1, 2, 5, 24])
def test_pictures_come_off_a_sheet_as_they_went_on(count: int) -> None:
    preprocess = Preprocess((6, 4), 1.0, "squash", "bicubic", (0.5,) * 3, (0.5,) * 3)
    pixels = np.random.default_rng(0).uniform(-1, 1, (count, 3, 6, 4)).astype(np.float32)
    sheet = contact_sheet(ImageSet.of(pixels, preprocess, source="test"))
    cells = pictures_on(sheet, count, (6, 4))
    for cell, image in zip(cells, pixels, strict=True):
        assert np.abs(np.asarray(cell).transpose(2, 0, 1) / 127.5 - 1 - image).max() < 0.01
    assert len(pictures_on(sheet.crop((0, 0, 3, 3)), count, (6, 4))) == 0
