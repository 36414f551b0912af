"""The bars on real weights and images: W8A8 from 32 synthetic images and nothing else, by the command line."""

import json
from pathlib import Path

import pytest

from dfq_deploy.cli import run

pytestmark = pytest.mark.imagenet


@pytest.mark.parametrize(
    ("model", "weights", "most_points_lost", "least_agreement", "most_points_lost_in_all"),
    [
        ("vit_t", "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors", 1.0, 96.5, 3.5),
        ("deit_t", "deit_tiny_patch16_224.fb_in1k_LNfixedpoint.safetensors", 1.0, 97.0, 1.0),
    ],
)
def test_synthetic_images_alone_keep_the_accuracy(
    model: str,
    weights: str,
    most_points_lost: float,
    least_agreement: float,
    most_points_lost_in_all: float,
    imagenet: Path,
    tmp_path: Path,
) -> None:
    folder, checkpoint = tmp_path / "run", str(imagenet / "weights" / weights)
    images = f"folder:{imagenet / 'imagenet_val'}"
    arguments = ["export", "--model", model, "--checkpoint", checkpoint, "--out", str(folder), "--images", images]
    code = run(arguments)
    found = json.loads((folder / "report.json").read_text())
    assert code == 0, found["reason"]
    assert found["n"] == 921
    assert found["top1"]["float"] - found["top1"]["engine"] <= most_points_lost
    assert found["agreement"]["engine_reference"] >= found["agreement"]["noise_floor"] - 1.0
    assert found["agreement"]["engine_float"] >= least_agreement
    noisy = json.loads(next((folder / "work").glob("noise-*")).read_text())
    assert run([*arguments, "--spare", "massive"]) == 0
    plain = json.loads((folder / "report.json").read_text())
    assert plain["top1"]["float"] - plain["top1"]["engine"] <= most_points_lost_in_all
    assert plain["agreement"]["engine_reference"] >= plain["agreement"]["noise_floor"] - 1.0
    assert plain["engine"]["layers"]["int8"] >= 47
    assert found["engine"]["layers"]["int8"] == plain["engine"]["layers"]["int8"] - len(noisy)
