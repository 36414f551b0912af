"""Contact sheets show the images as they are, beside their file, and nothing waits for them."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dfq_deploy as dfq
from calibrators.images import ImageSet
from calibrators.pictures import contact_sheet, seen_beside, sheet_beside
from calibrators.preprocess import Preprocess
from dfq_deploy import looking
from dfq_deploy.recipe import GenerateRecipe


def _images(count: int, mean: tuple[float, ...]) -> tuple[ImageSet, np.ndarray]:
    """Images of a model with this mean, and their pixels from 0 to 1."""
    std = (0.2, 0.3, 0.25)[: len(mean)]
    levels = np.random.default_rng(0).random((count, len(mean), 6, 4)).astype(np.float32)
    scale = [np.asarray(v, np.float32).reshape(-1, 1, 1) for v in (mean, std)]
    preprocess = Preprocess((6, 4), 1.0, "squash", "bicubic", mean, std)
    return ImageSet.of((levels - scale[0]) / scale[1], preprocess, source="test"), levels


@pytest.mark.parametrize("mean", [(0.5,), (0.4, 0.5, 0.6)])
def test_the_pixels_of_a_sheet_are_the_denormalised_images(mean: tuple[float, ...]) -> None:
    images, levels = _images(5, mean)
    sheet = np.asarray(contact_sheet(images), np.float32) / 255
    assert sheet.shape[:2] == (2 * 6 + 2, 3 * 4 + 2 * 2)
    sheet = sheet.reshape(*sheet.shape[:2], -1).transpose(2, 0, 1)
    for index in range(5):
        top, left = index // 3 * 8, index % 3 * 6
        shown = sheet[:, top : top + 6, left : left + 4]
        assert np.abs(shown - levels[index]).max() <= 1 / 255
    assert (sheet[:, 8:, 12:] == 1).all(), "the place of a sixth image"


def test_a_sheet_of_many_shows_64_of_all() -> None:
    images, levels = _images(256, (0.5,))
    sheet = np.asarray(contact_sheet(images), np.float32) / 255
    assert sheet.shape == (8 * 6 + 7 * 2, 8 * 4 + 7 * 2)
    assert np.abs(sheet[-6:, -4:] - levels[252, 0]).max() <= 1 / 255


@pytest.mark.parametrize(("file", "sheet"), [("a.safetensors", "a.png"), ("a.png", "a.png.png"), ("a.b", "a.b.png")])
def test_a_sheet_never_takes_the_name_of_its_images(file: str, sheet: str) -> None:
    assert sheet_beside(Path("o") / file) == Path("o") / sheet


def test_generate_draws_a_sheet(tmp_path: Path) -> None:
    dfq.generate(GenerateRecipe(model="demo", generator="noise", count=3), tmp_path / "images.safetensors")
    with Image.open(tmp_path / "images.png") as sheet:
        assert (sheet.format, sheet.size) == ("PNG", (66, 66))


def test_generate_draws_what_the_model_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, drawn = tmp_path / "images.safetensors", []
    for name in ("plot_similarity", "plot_attention"):
        plot = getattr(looking, name)
        monkeypatch.setattr(looking, name, lambda *given, plot=plot: drawn.append(given) or plot(*given))
    dfq.generate(GenerateRecipe(model="demo", generator="spdfq,noise", count=6), path)
    (compared, title, _), (maps, *_) = drawn
    assert title == "demo: 6 images, synthetic:spdfq+noise"
    assert all(list(sets) == ["images", "noise"] for sets in compared.values())
    assert maps.priors is not None
    for picture in seen_beside(path):
        with Image.open(picture) as opened:
            assert opened.format == "PNG"
    dfq.generate(GenerateRecipe(model="demo", generator="noise", count=3), path)
    assert not any(picture.exists() for picture in seen_beside(path)), "of images that are gone"


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    watch, path = _Repeated(), tmp_path / "images.safetensors"
    recipe = GenerateRecipe(model="resnet18", random_weights=True, generator="dead_leaves", count=2)
    dfq.generate(recipe, path, watch=watch)
    assert [text.split(":")[0] for text in watch.told] == [f"no {picture.name}" for picture in seen_beside(path)]
    assert not any(picture.exists() for picture in seen_beside(path))


class _Repeated:
    """A watch that remembers the stages that were not done already."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.told: list[str] = []

    def stage(self, name: str, already_done: bool) -> None:
        self.stages += [] if already_done else [name]

    def progress(self, done: int, total: int, terms: Mapping[str, float]) -> None:
        pass

    def tell(self, text: str) -> None:
        self.told.append(text)


def test_an_export_goes_on_without_its_sheet(demo_bundle: Path, tmp_path: Path) -> None:
    run, watch = tmp_path / "run", _Repeated()
    shutil.copytree(demo_bundle, run)
    (sheet,) = (run / "work").glob("images-*.png")
    assert sheet == sheet_beside(next((run / "work").glob("images-*.safetensors")))
    sheet.unlink()
    recipe = dfq.Recipe(model="demo", generator="noise", count=8, refine="none")
    assert dfq.export(recipe, run, limit=4, watch=watch).verdict == "pass"
    assert watch.stages == ["model", "check"], "the others were done"
