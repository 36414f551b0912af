"""Images made on a GPU: every generator works there, and the model comes back to the CPU."""

import numpy as np
import pytest
import torch

from calibrators.registry import names
from dfq_deploy import pipeline
from dfq_deploy.generation import GenerateOptions
from dfq_deploy.generation.making import make_images
from dfq_deploy.models.loading import load_model
from dfq_deploy.recipe import GenerateRecipe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("generator", [name for name in names("dfq_deploy.generation.generators") if name != "zeroq"])
def test_images_come_from_the_gpu(generator, tmp_path):
    made = pipeline.generate(
        GenerateRecipe(model="demo", generator=generator, count=4, device="cuda"), tmp_path / "images.safetensors"
    )
    assert made.made_by["device"] == "cuda"
    assert made.pixels[:].shape == (4, 3, 32, 32)
    assert np.isfinite(made.pixels[:]).all()
    assert (made.student is not None) == (generator == "psaq_v2")


def test_a_gpu_is_taken_where_there_is_one(tmp_path):
    made = pipeline.generate(GenerateRecipe(model="demo", generator="noise", count=1), tmp_path / "images.safetensors")
    assert made.made_by["device"] == "cuda"


def test_the_model_is_back_on_the_cpu_and_the_images_moved_towards_their_classes():
    model = load_model("demo")
    images = make_images(["dfq"], model, GenerateOptions(8, device="cuda"))
    ((first, last),) = images.made_by["loss"]
    assert last["cross_entropy"] < first["cross_entropy"]
    assert next(model.module.parameters()).device == torch.device("cpu")
