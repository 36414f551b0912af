"""Classes of pictures: in their order, in batches, and past those that cannot be read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dfq_deploy as dfq
from calibrators.errors import ImagesError
from dfq_deploy import cli
from exporters.bundle import MANIFEST


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Digits of noise, and among them a text and a file that is not there."""
    random = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(random.integers(0, 255, (28, 28), np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_text("no picture")
    (tmp_path / "3.png").unlink()
    return [tmp_path / f"{number}.png" for number in range(5)]


def test_bad_pictures_do_not_keep_the_others_from_their_answers(demo_bundle: Path, images: list[Path]) -> None:
    answers = dfq.infer(demo_bundle, images, top=3)
    assert [answer.image for answer in answers] == [str(image) for image in images]
    assert [isinstance(answer.error, ImagesError) for answer in answers] == [False, True, False, True, False]
    with dfq.load(demo_bundle) as runner:
        for image, answer in zip(images, answers, strict=True):
            if answer.error:
                assert answer.classes == ()
                continue
            logits = runner(runner.preprocess(image))[0].astype(np.float64)
            shares = np.exp(logits) / np.exp(logits).sum()
            assert [guess.index for guess in answer.classes] == np.argsort(-shares)[:3].tolist()
            assert [guess.name for guess in answer.classes] == [str(guess.index) for guess in answer.classes]
            for guess in answer.classes:
                assert guess.probability == pytest.approx(shares[guess.index], rel=1e-4)


def test_more_pictures_than_the_largest_batch(demo_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(demo_bundle, folder, ignore=shutil.ignore_patterns("work"))
    facts = json.loads((folder / MANIFEST).read_text())
    facts["engine"]["options"]["batch"] = [1, 2, 3]
    (folder / MANIFEST).write_text(json.dumps(facts))
    pictures = [np.full((8, 8, 3), 25 * number, np.uint8) for number in range(8)]
    found = dfq.infer(folder, [*pictures[:4], b"broken", *pictures[4:]], top=10)
    assert [answer.image for answer in found] == [f"images[{number}]" for number in range(9)]
    assert found.pop(4).error is not None
    alone = [dfq.infer(demo_bundle, [picture], top=10)[0] for picture in pictures[:2]]
    for one, among in zip(alone, found, strict=False):
        assert [guess.index for guess in one.classes] == [guess.index for guess in among.classes]


def test_no_pictures_have_no_answers(demo_bundle: Path) -> None:
    assert dfq.infer(demo_bundle, []) == []


def test_the_command_answers_the_good_and_tells_the_bad(
    demo_bundle: Path, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["infer", str(demo_bundle), *map(str, images), "--top", "1"]) == 3
    said = capsys.readouterr()
    assert said.out.splitlines()[::2] == [str(images[number]) for number in (0, 2, 4)]
    assert said.out.count(" % ") == 3
    assert [line.partition(":")[0] for line in said.err.splitlines()] == ["error", "  why", "  fix"] * 2
    assert f"`{images[1]}` is not a whole image" in said.err
    assert f"`{images[3]}` cannot be read.\n  why: No such file or directory.\n  fix: check the path." in said.err


def test_json_has_an_object_for_each_image(
    demo_bundle: Path, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["infer", str(demo_bundle), *map(str, images), "--top", "2", "--json"]) == 3
    said = capsys.readouterr()
    rows = json.loads(said.out)
    assert said.err == ""
    assert [row["image"] for row in rows] == [str(image) for image in images]
    assert [set(row) for row in rows] == [{"image", "error" if number in (1, 3) else "classes"} for number in range(5)]
    assert rows[1]["error"].keys() == {"what", "why", "fix"}
    assert [guess.keys() for guess in rows[0]["classes"]] == [{"index", "name", "probability"}] * 2
