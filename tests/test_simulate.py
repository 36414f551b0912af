"""Schemes that are simulated only: what they quantize, what is said of them, and that a second run goes on."""

import json
from pathlib import Path

import numpy as np
import pytest

import dfq_deploy as dfq
from calibrators.plan import QuantPlan
from calibrators.scheme import SCHEMES
from dfq_deploy.cli import run
from dfq_deploy.recipe import CalibrateRecipe, SimulateRecipe

_SIMULATED = [scheme.name for scheme in SCHEMES.values() if scheme.simulated]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished simulation of the demo in W4A4, with ranges alone."""
    folder = tmp_path_factory.mktemp("simulated") / "run"
    dfq.simulate(_recipe("w4a4"), folder)
    return folder


def _recipe(scheme: str) -> CalibrateRecipe:
    return CalibrateRecipe(model="demo", generator="noise", count=8, scheme=scheme, refine="none")


def test_all_that_the_papers_quantize_is_quantized(folder: Path) -> None:
    plan = QuantPlan.load(folder / "plan.safetensors")
    assert not plan.spared
    formats = {site.removeprefix("blocks.3."): qparams.codes.name for site, qparams in plan.sites.items()}
    ends = ["patch_embed.proj", "head"]
    assert {formats[f"{layer}.weight"] for layer in ends} == {"int8"}
    assert {formats[f"{layer}.input"] for layer in ends} == {"uint8"}
    layers = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert {formats[f"{layer}.weight"] for layer in layers} == {"int4"}
    assert {formats[f"{layer}.input"] for layer in layers} == {"uint4"}
    assert {formats[f"attn.{operand}"] for operand in ("qk.lhs", "qk.rhs", "av.rhs")} == {"uint4"}
    assert formats["attn.av.lhs"] == "log2_uint4"
    assert plan.sites["blocks.0.attn.qkv.weight"].axis == 0


def test_a_softmax_may_have_even_steps(tmp_path: Path) -> None:
    recipe = SimulateRecipe(model="demo", generator="noise", count=8, refine="none", softmax="even")
    dfq.simulate(recipe, tmp_path / "run", limit=8)
    plan = QuantPlan.load(tmp_path / "run" / "plan.safetensors")
    assert {q.codes.name for site, q in plan.sites.items() if site.endswith("av.lhs")} == {"uint4"}


@pytest.mark.parametrize("scheme", _SIMULATED)
def test_a_simulation_is_reported_with_intervals(scheme: str, tmp_path: Path) -> None:
    found = dfq.simulate(_recipe(scheme), tmp_path / "run", limit=64)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["scheme"], report["n"], report["simulated"]) == (scheme, 64, True)
    assert found.top1 is not None and found.drop is not None
    assert report["top1"]["simulated"]["percent"] == found.top1["simulated"].percent
    assert found.drop[1] <= found.top1["float"].percent - found.top1["simulated"].percent <= found.drop[2]
    assert 90 < found.agreement.percent <= found.agreement.high
    assert 5 < found.sqnr_db < 60, "it rounds, and so differs"


def test_what_wants_a_bundle_says_that_this_is_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("report", "gate", "check", "infer"):
        assert run([command, str(folder), *(["image.png"] if command == "infer" else [])]) == 3
        assert "why: it is a simulation, which has no engine." in capsys.readouterr().err


def test_a_second_run_goes_on_where_the_first_was(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "demo", "--generator", "noise", "--count", "8", "--refine", "none", "--scheme", "w4a4"]
    before = (folder / "report.json").read_bytes()
    assert run(["simulate", *flags, "--out", str(folder)]) == 0
    assert capsys.readouterr().err.count("already done") == 2  # images and ranges
    assert (folder / "report.json").read_bytes() == before


def test_a_simulation_without_labels_says_how_it_agrees(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images,) = (folder / "work").glob("images-*.safetensors")
    flags = ["--model", "demo", "--scheme", "w6a6", "--refine", "none", "--calib", str(images), "--limit", "4"]
    assert run(["simulate", *flags, "--images", str(images), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "w6a6, simulated in PyTorch: 4 images" in said.replace("\n", " ")
    assert "simulated agrees with float" in said and "loses" not in said


def test_any_scheme_can_be_simulated(tmp_path: Path) -> None:
    found = dfq.simulate(_recipe("w8a8"), tmp_path / "run", limit=16)
    assert found.scheme == "w8a8"
    assert found.agreement.percent == 100
    assert np.isfinite(found.sqnr_db)
