"""The range of what reads the image: black to white, by definition, whatever was calibrated on."""

from pathlib import Path

import numpy as np
import pytest

import dfq_deploy as dfq
from calibrators.images import ImageSet
from calibrators.observers import MinMax, Percentile
from calibrators.observing import observed
from calibrators.ranges import SiteRange
from calibrators.sites import sites_of
from dfq_deploy.models import Model
from dfq_deploy.models.loading import load_model

_NAMES = ("demo", "deit_t", "swin_t")


def _first_range(model: Model, pixels: np.ndarray, observer: type = MinMax) -> tuple[SiteRange, SiteRange]:
    """Ranges of the input and of the output of the layer that reads the image, seen on `pixels`."""
    images = ImageSet.of(pixels, model.preprocess, source="test")
    sites = observed(model.module, images, lambda _: observer())
    return sites["patch_embed.proj.input"], sites["patch_embed.proj.output"]


@pytest.mark.parametrize("name", _NAMES)
def test_the_first_layer_alone_has_the_range_of_pixels(name: str) -> None:
    model = load_model(name, random_weights=True)
    fixed = {
        site: place.fixed for site, place in sites_of(model.module).items() if place.fixed and place.role == "input"
    }
    black, white = model.preprocess.bounds
    assert fixed == {"patch_embed.proj.input": (float(black.min()), float(white.max()))}


@pytest.mark.parametrize("observer", [MinMax, Percentile])
def test_the_range_does_not_depend_on_the_images(observer: type) -> None:
    model = load_model("demo")
    grey = np.zeros((2, *model.preprocess.shape), np.float32)
    beyond = np.random.default_rng(0).normal(0, 9, grey.shape).astype(np.float32)
    (one, dark), (other, bright) = (_first_range(model, pixels, observer) for pixels in (grey, beyond))
    for seen in (one, other):
        assert (seen.low.tolist(), seen.high.tolist()) == (-1, 1)
        assert (seen.low.dtype, seen.low.shape, seen.shape) == (np.float32, (), model.preprocess.shape)
    assert dark.high < bright.high, "what is not fixed is observed"


def test_a_plan_of_noise_and_one_of_other_noise_agree_where_the_image_is_read(tmp_path: Path) -> None:
    plans = [
        dfq.calibrate(
            dfq.Recipe(model="demo", generator="noise", count=2, seed=seed, spare="none"),
            tmp_path / f"{seed}.safetensors",
        )
        for seed in (0, 1)
    ]
    one, other = (plan.sites["patch_embed.proj.input"] for plan in plans)
    assert one.scale == other.scale == np.float32(1 / 127)
    assert plans[0].sites["blocks.0.attn.qkv.input"].scale != plans[1].sites["blocks.0.attn.qkv.input"].scale
