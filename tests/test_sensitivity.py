"""Which layers hurt: each number is what a reference made by hand gives, and what is planted is found."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dfq_deploy as dfq
from calibrators.errors import PlanError
from calibrators.images import ImageSet
from calibrators.plan import QuantPlan
from dfq_deploy import cli
from dfq_deploy.analysis import Effect, LayerEffect, Sensitivity, analyse
from dfq_deploy.assignment import noisy_layers
from dfq_deploy.formats import formats_for_spared
from dfq_deploy.models import Model
from dfq_deploy.reference import Reference

_IMAGES = 6


@pytest.fixture(scope="module")
def found(demo_bundle: Path) -> Sensitivity:
    return dfq.sensitivity(demo_bundle, limit=_IMAGES)


@pytest.fixture(scope="module")
def plan(demo_bundle: Path) -> QuantPlan:
    return QuantPlan.load(demo_bundle / "plan.safetensors")


@pytest.fixture(scope="module")
def images(demo_bundle: Path) -> ImageSet:
    (kept,) = (demo_bundle / "work").glob("images-*.safetensors")
    return ImageSet.load(kept).spread(_IMAGES)


@pytest.fixture(scope="module")
def everything(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantPlan:
    """The plan of the same images that spares nothing."""
    (kept,) = (demo_bundle / "work").glob("images-*.safetensors")
    recipe = dfq.Recipe(model="demo", calib=str(kept), refine="none", spare="none", attention=True)
    return dfq.calibrate(recipe, tmp_path_factory.mktemp("plan") / "plan.safetensors")


def _layer(found: Sensitivity, name: str) -> LayerEffect:
    return next(layer for layer in found.layers if layer.name == name)


def _by_hand(demo: Model, plan: QuantPlan, sites: set[str], images: ImageSet) -> tuple[float, float]:
    """SQNR in dB and top-1 agreement in percent with these sites quantized."""
    assert sites <= plan.sites.keys()
    part = Reference(demo, dataclasses.replace(plan, sites={site: plan.sites[site] for site in sites}))
    pixels = images.pixels[:_IMAGES]
    wanted, given = part.float(pixels).astype(np.float64), part.quantized(pixels).astype(np.float64)
    sqnr = 10 * np.log10((wanted**2).sum() / ((given - wanted) ** 2).sum())
    return float(sqnr), 100 * float((wanted.argmax(1) == given.argmax(1)).mean())


def _is(effect: Effect | None, wanted: tuple[float, float]) -> None:
    assert effect is not None
    assert effect.agreement.n == _IMAGES
    assert (effect.sqnr_db, effect.agreement.percent) == (pytest.approx(wanted[0], abs=0.02), pytest.approx(wanted[1]))


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv", "blocks.3.mlp.fc2"])
def test_a_layer_is_quantized_alone_and_spared_alone(
    found: Sensitivity, demo: Model, plan: QuantPlan, images: ImageSet, name: str
) -> None:
    layer, sites = _layer(found, name), {f"{name}.input", f"{name}.weight"}
    _is(layer.alone, _by_hand(demo, plan, sites, images))
    others = _by_hand(demo, plan, set(plan.sites) - sites, images)
    _is(layer.others, others)
    whole = _by_hand(demo, plan, set(plan.sites), images)[0]
    assert layer.gain_db == pytest.approx(others[0] - whole, abs=0.03)
    assert layer.sites.keys() == sites
    for site, effect in layer.sites.items():
        _is(effect, _by_hand(demo, plan, {site}, images))
        rest = _by_hand(demo, plan, set(plan.sites) - {site}, images)
        _is(effect.others, rest)
        assert effect.gain_db == pytest.approx(rest[0] - whole, abs=0.03)


def test_the_whole_plan_and_the_sum_of_its_layers(found: Sensitivity, demo: Model, plan: QuantPlan) -> None:
    assert sorted(layer.name for layer in found.layers) == sorted(plan.layers)
    noises = np.array([layer.alone.noise for layer in found.layers])
    assert (np.diff(noises) <= 0).all(), "the most harmful comes first"
    signal = found.whole.noise * 10 ** (found.whole.sqnr_db / 10)
    assert found.summed_db == pytest.approx(10 * np.log10(signal / noises.sum()), abs=0.02)
    shares = [layer.noise_percent for layer in found.layers]
    np.testing.assert_allclose(shares, 100 * noises / noises.sum(), atol=0.01)


def test_multiply_accumulates_are_counted_layer_by_layer(found: Sensitivity) -> None:
    tokens, width, hidden, heads = 65, 64, 256, 4
    block = {
        "attn.qkv": tokens * width * 3 * width,
        "attn.proj": tokens * width * width,
        "mlp.fc1": tokens * width * hidden,
        "mlp.fc2": tokens * hidden * width,
        "attn.qk": heads * tokens * tokens * (width // heads),
        "attn.av": heads * tokens * tokens * (width // heads),
    }
    macs = {f"blocks.{i}.{name}": count for i in range(4) for name, count in block.items()}
    macs |= {"patch_embed.proj": 64 * 4 * 4 * 3 * width, "head": width * 10}
    shares = {layer.name: layer.macs_percent for layer in (*found.layers, *found.spared)}
    assert shares == pytest.approx({name: 100 * count / sum(macs.values()) for name, count in macs.items()}, abs=1e-3)


def test_what_the_plan_spares_is_measured_as_the_plan_would_quantize_it(
    found: Sensitivity, demo: Model, plan: QuantPlan, everything: QuantPlan, images: ImageSet, demo_bundle: Path
) -> None:
    formats = formats_for_spared(plan, demo, demo_bundle / "work", blocks=(32, 64))
    assert formats.keys() == plan.spared.keys()
    for site, qparams in formats.items():
        np.testing.assert_array_equal(qparams.scale, everything.sites[site].scale)
        assert qparams.codes == everything.sites[site].codes
    spared = {layer.name: layer for layer in found.spared}
    assert spared.keys() == set(everything.layers) - set(plan.layers)
    assert spared["head"].reason == plan.spared["head.weight"]
    for name in ("head", "patch_embed.proj", "blocks.2.attn.av"):
        sites = {site for site in everything.sites if site.startswith(f"{name}.")}
        _is(spared[name].alone, _by_hand(demo, everything, sites, images))


def test_attention_matmuls_are_layers_whose_sites_are_their_operands(
    demo: Model, everything: QuantPlan, images: ImageSet
) -> None:
    found = analyse(demo, everything, images, spared={})
    layer = _layer(found, "blocks.1.attn.av")
    assert layer.sites.keys() == {"blocks.1.attn.av.lhs", "blocks.1.attn.av.rhs"}
    _is(layer.sites["blocks.1.attn.av.lhs"], _by_hand(demo, everything, {"blocks.1.attn.av.lhs"}, images))
    assert not found.spared


@pytest.mark.parametrize("name", ["blocks.1.mlp.fc2", "blocks.2.attn.proj"])
@pytest.mark.parametrize("role", ["input", "weight"])
def test_a_layer_that_is_broken_on_purpose_comes_first(
    demo: Model, plan: QuantPlan, images: ImageSet, name: str, role: str
) -> None:
    site = f"{name}.{role}"
    bad = dataclasses.replace(plan.sites[site], scale=np.asarray(50 * plan.sites[site].scale, np.float32))
    found = analyse(demo, dataclasses.replace(plan, sites={**plan.sites, site: bad}), images, spared={})
    worst = found.layers[0]
    assert worst.name == name
    assert worst.noise_percent > 40
    assert worst.gain_db > 1
    assert max(worst.sites, key=lambda one: worst.sites[one].noise) == site


def test_noisy_layers_are_those_that_make_the_noise_and_no_more(demo: Model, plan: QuantPlan, images: ImageSet) -> None:
    coarse = {
        site: dataclasses.replace(q, scale=np.asarray(q.scale * np.float32(50)))
        if site.startswith("blocks.1.mlp.fc1.")
        else q
        for site, q in plan.sites.items()
    }
    broken = dataclasses.replace(plan, sites=coarse)
    whole = analyse(demo, plan, images, spared={}).whole.sqnr_db
    found = noisy_layers(demo, broken, images, wanted_db=whole - 3)
    assert list(found) == ["blocks.1.mlp.fc1"]
    assert "% of the noise" in found["blocks.1.mlp.fc1"]
    assert noisy_layers(demo, broken, images, wanted_db=-100) == {}
    assert set(noisy_layers(demo, plan, images, wanted_db=1000)) == set(plan.layers)


def test_noisy_layers_stay_within_the_budget(demo: Model, plan: QuantPlan, images: ImageSet) -> None:
    costs = {layer: 1.0 + index % 2 for index, layer in enumerate(plan.layers)}
    found = noisy_layers(demo, plan, images, wanted_db=1000, costs=costs, budget=5.5)
    assert 4.5 < sum(costs[layer] for layer in found) <= 5.5
    assert noisy_layers(demo, plan, images, wanted_db=1000, costs=costs, budget=0.5) == {}


def test_each_measurement_is_told(demo: Model, plan: QuantPlan, images: ImageSet) -> None:
    told: list[tuple[int, int]] = []
    analyse(demo, plan, images, spared={}, progress=lambda done, total: told.append((done, total)))
    total = 1 + 2 * (len(plan.layers) + len(plan.sites))
    assert told == [(done, total) for done in range(1, total + 1)]


def test_batches_do_not_matter(demo: Model, plan: QuantPlan, images: ImageSet, found: Sensitivity) -> None:
    again = analyse(demo, plan, images, spared={}, batch_size=4)
    assert again.whole.sqnr_db == pytest.approx(found.whole.sqnr_db, abs=0.3)
    assert again.n == _IMAGES


def test_a_plan_of_one_layer_leaves_nothing_when_it_is_spared(demo: Model, plan: QuantPlan, images: ImageSet) -> None:
    sites = {site: qparams for site, qparams in plan.sites.items() if site.startswith("blocks.0.attn.qkv.")}
    found = analyse(demo, dataclasses.replace(plan, sites=sites), images, spared={})
    (layer,) = found.layers
    assert (layer.others.sqnr_db, layer.gain_db, layer.noise_percent) == (np.inf, np.inf, 100.0)
    report = json.loads(json.dumps(found.report(), allow_nan=False))
    assert report["layers"][0]["others"]["sqnr_db"] is None


def test_labels_are_not_looked_at(demo_bundle: Path, images: ImageSet, tmp_path: Path, found: Sensitivity) -> None:
    labels = np.full(_IMAGES, 10**6)
    labelled = ImageSet.of(images.pixels, images.preprocess, source="labelled", labels=labels)
    labelled.save(tmp_path / "labelled.safetensors")
    again = dfq.sensitivity(demo_bundle, images=str(tmp_path / "labelled.safetensors"))
    assert again.whole == found.whole


def test_without_any_images_noise_is_used_and_named(demo_bundle: Path, tmp_path: Path, found: Sensitivity) -> None:
    shutil.copytree(demo_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("work"))
    alone = dfq.sensitivity(tmp_path / "bundle", limit=2)
    assert (alone.n, alone.images) == (2, "2 of synthetic:noise")
    assert all(layer.alone is None and layer.reason for layer in alone.spared)
    assert alone.massive == found.massive
    assert [layer.macs_percent for layer in alone.spared] == [layer.macs_percent for layer in found.spared]


def test_ranges_of_other_images_are_not_taken(demo_bundle: Path, demo: Model, plan: QuantPlan) -> None:
    other = dataclasses.replace(plan, images="of others")
    assert formats_for_spared(other, demo, demo_bundle / "work", blocks=(32, 64)) == {}


def test_a_bundle_that_quantizes_nothing_has_nothing_to_measure(tmp_path: Path) -> None:
    dfq.export(dfq.Recipe(model="demo", generator="noise", count=2, scheme="float"), tmp_path, limit=1)
    with pytest.raises(PlanError, match="nothing to measure") as caught:
        dfq.sensitivity(tmp_path)
    assert "quantizes nothing" in caught.value.why


_EFFECT = {"noise", "sqnr_db", "agreement"}
_SCHEMA: dict[str, set[str]] = {
    "": {"model", "scheme", "n", "images", "whole", "summed_db", "layers", "spared", "massive"},
    "layers": {"name", "alone", "others", "gain_db", "noise_percent", "macs_percent", "sites"},
    "spared": {"name", "reason", "macs_percent", "alone"},
}


def test_the_command_prints_and_writes_all_the_numbers(
    demo_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], found: Sensitivity
) -> None:
    files = {"--json": tmp_path / "new" / "found.json", "--plot": tmp_path / "found.png"}
    options = [part for flag, path in files.items() for part in (flag, str(path))]
    assert cli.run(["sensitivity", str(demo_bundle), "--limit", str(_IMAGES), *options]) == 0
    said = capsys.readouterr().out
    assert all(layer.name in said for layer in found.layers)
    report: dict[str, Any] = json.loads(files["--json"].read_text())
    assert report == json.loads(json.dumps(found.report()))
    assert report.keys() == _SCHEMA[""]
    for part in ("layers", "spared"):
        assert all(entry.keys() == _SCHEMA[part] for entry in report[part])
    assert report["whole"].keys() == report["layers"][0]["alone"].keys() == _EFFECT
    assert report["whole"]["agreement"].keys() == {"percent", "low", "high", "n"}
    with Image.open(files["--plot"]) as picture:
        assert len(picture.convert("RGB").getcolors(2**24) or []) > 3
