"""What a person sees of a sensitivity analysis, on the terminal and in a chart."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from syrupy.assertion import SnapshotAssertion

import dfq_deploy as dfq
from calibrators.errors import RecipeError
from dfq_deploy.analysis import Effect, LayerEffect, Sensitivity, SiteEffect, SparedLayer
from dfq_deploy.measures import Share
from dfq_deploy.showing.console import console
from dfq_deploy.showing.sensitivity import print_sensitivity
from dfq_deploy.sparing import Massive

_AGREED = Share(87.5, 63.98, 96.5, 16)
_MADE_UP = Sensitivity(
    model="demo",
    scheme="w8a8",
    n=16,
    images="16 of synthetic:psaq_v1",
    whole=Effect(2.0, 18.64, _AGREED),
    summed_db=18.72,
    layers=(
        *(
            LayerEffect(
                name=f"layers.2.blocks.{i}.mlp.fc2",
                alone=Effect(1.0 / (i + 1), 20.0 + i, _AGREED),
                others=Effect(1.0, 19.5, Share(93.75, 71.7, 98.9, 16)),
                gain_db=0.86,
                noise_percent=round(40 / (i + 1), 2),
                macs_percent=2.32,
                sites={
                    f"layers.2.blocks.{i}.mlp.fc2.input": SiteEffect(
                        0.5, 21.0, _AGREED, Effect(1.0, 19.5, _AGREED), 0.5
                    ),
                    f"layers.2.blocks.{i}.mlp.fc2.weight": SiteEffect(
                        0.0, np.inf, _AGREED, Effect(1.0, 19.5, _AGREED), 0.0
                    ),
                },
            )
            for i in range(22)
        ),
    ),
    spared=(
        *(
            SparedLayer(f"blocks.{i}.attn.qk", "attention stays float", 0.6, Effect(1, 50.0 + i, _AGREED))
            for i in range(5)
        ),
        SparedLayer("head", "it puts out the logits", 0.01, None),
    ),
    massive=(
        Massive("blocks.7.mlp.fc2", False, {417: 195.2}, 16, 788, 0.9999, 3.22),
        Massive("blocks.8.norm1", True, {41: 524.2}, 16, 788, 0.999, 11.9),
        Massive("blocks.8.norm2", True, {41: 526.5}, 16, 788, 0.999, 12.0),
    ),
)


def test_the_tables_look_as_they_should(
    snapshot: SnapshotAssertion, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "width", 80)
    print_sensitivity(_MADE_UP)
    assert capsys.readouterr().out == snapshot


def test_a_chart_is_a_picture(tmp_path: Path) -> None:
    dfq.plot_sensitivity(_MADE_UP, tmp_path / "new" / "chart.png")
    with Image.open(tmp_path / "new" / "chart.png") as picture:
        assert min(picture.size) > 400
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24) or []}
    assert {(47, 111, 159), (224, 164, 88), (255, 255, 255)} <= colours


def test_a_chart_names_every_layer_and_what_was_measured(tmp_path: Path) -> None:
    dfq.plot_sensitivity(_MADE_UP, tmp_path / "chart.svg")
    drawn = (tmp_path / "chart.svg").read_text(encoding="utf-8")
    for text in (
        "demo, w8a8",
        "16 images, 16 of synthetic:psaq_v1",
        "dB (the longer",
        "spared, not measured",
        "18.6 dB",
    ):
        assert text in drawn, text
    for layer in (*_MADE_UP.layers, *_MADE_UP.spared):
        assert f"<!-- {layer.name} -->" in drawn


def test_a_chart_of_layers_that_change_nothing_is_drawn(tmp_path: Path) -> None:
    exact = Effect(0.0, np.inf, _AGREED)
    layer = dataclasses.replace(_MADE_UP.layers[0], alone=exact, noise_percent=0.0)
    dfq.plot_sensitivity(dataclasses.replace(_MADE_UP, whole=exact, layers=(layer,), spared=()), tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["chart.bmp", "chart"])
def test_a_format_that_is_none_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="names no format of pictures"):
        dfq.plot_sensitivity(_MADE_UP, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_loaded_only_to_draw(demo_bundle: Path, tmp_path: Path) -> None:
    script = """
import sys
import dfq_deploy as dfq
from dfq_deploy.cli import run
assert run(["--help"]) == run(["sensitivity", "--help"]) == 0
assert run(["sensitivity", sys.argv[1], "--limit", "1"]) == 0
assert run(["calibrate", "--model", "demo", "--generator", "noise", "--count", "8", "--out", sys.argv[2]]) == 0
assert "matplotlib" not in sys.modules
dfq.plot_sensitivity
assert "matplotlib" in sys.modules
"""
    subprocess.run(
        [sys.executable, "-c", script, demo_bundle, tmp_path / "plan"], check=True, capture_output=True, timeout=120
    )
