"""Models of Hugging Face transformers, tiny and with random weights: what is found in them, and PSAQ-ViT V2 on them."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tiny_transformers import EDGE, TASKS, tiny

import dfq_deploy as dfq
from calibrators.images import ImageSet
from calibrators.sites import sites_of
from dfq_deploy.formats import FormatsOf
from dfq_deploy.generation import GenerateOptions
from dfq_deploy.generation.generators.psaq_v2 import PsaqV2
from dfq_deploy.generation.taps import attention_taps
from dfq_deploy.models import Model
from dfq_deploy.recipe import CalibrateRecipe

# Outputs; attentions with their heads, windows and patch tokens; layers that stay float.
FOUND = {
    "clip": ({"last_hidden_state": (17, 32), "pooler_output": (32,)}, [(4, 1, 16)] * 2, 0),
    "detr": ({"logits": (10, 8), "boxes": (10, 4)}, [(4, 1, 16)] * 2, 3),
    "dinov2": ({"last_hidden_state": (17, 32), "pooler_output": (32,)}, [(4, 1, 16)] * 2, 0),
    "dinov3": ({"last_hidden_state": (17, 32), "pooler_output": (32,)}, [(4, 1, 16)] * 2, 0),
    "mask2former": ({"logits": (7, 16, 16)}, None, None),
    "rt_detr": ({"sigmoid_logits": (10, 7), "boxes": (10, 4)}, [(4, 1, 4)], None),
    "segformer": ({"logits": (7, 16, 16)}, [(1, 1, 256), (2, 1, 64), (2, 1, 16), (4, 1, 4)], 0),
    "siglip": ({"last_hidden_state": (16, 32), "pooler_output": (32,)}, [(4, 1, 16)] * 2, 0),
    "upernet": ({"logits": (7, 64, 64)}, None, 0),
    "yolos": ({"logits": (10, 8), "boxes": (10, 4)}, [(4, 1, 26)] * 2, 0),
}


def _wrapped(name: str) -> Model:
    return dfq.wrap(tiny(name), torch.zeros(1, 3, EDGE, EDGE), TASKS[name])


@pytest.mark.parametrize("name", sorted(TASKS))
def test_outputs_attention_and_layers_are_found(name: str) -> None:
    outputs, attentions, floats = FOUND[name]
    model = _wrapped(name)
    assert {output.name: output.shape for output in model.outputs} == outputs
    taps = [(tap.heads, tap.windows, tap.tokens) for tap in attention_taps(model)]
    assert taps == attentions if attentions else taps
    layers = {site.rpartition(".")[0] for site in sites_of(model.module) if site.endswith(".weight")}
    plain = [name for name, layer in model.module.named_modules() if type(layer) in (torch.nn.Linear, torch.nn.Conv2d)]
    assert len(layers) >= 11
    assert floats is None or len(plain) == floats, plain


@pytest.mark.parametrize(
    ("name", "wanted"), [("clip", True), ("dinov2", True), ("dinov3", True), ("siglip", False), ("yolos", True)]
)
def test_a_class_token_among_the_embeddings_is_found(name: str, wanted: bool) -> None:
    assert {tap.class_token for tap in attention_taps(_wrapped(name))} == {wanted}


def test_a_detector_that_counts_its_images_by_len_is_exported(tmp_path: Path) -> None:
    found = dfq.export(
        _wrapped("rt_detr"), tmp_path / "run", generator="noise", count=8, refine="none", spare="massive"
    )
    assert found.verdict == "pass", found.reason
    assert found.engine.census.counts["int8"] >= 70
    assert found.agreement["engine_reference"].percent >= 99


@pytest.mark.parametrize("name", ["upernet", "yolos"])
def test_psaq_v2_runs_to_the_end(name: str, tmp_path: Path) -> None:
    found = dfq.export(_wrapped(name), tmp_path / "run", generator="psaq_v2", count=4, refine="none")
    assert found.verdict != "fail", found.reason
    assert found.student
    assert found.agreement["engine_float"].percent > 95


@pytest.mark.parametrize("name", ["detr", "upernet", "yolos"])
def test_the_student_of_psaq_v2_comes_closer(name: str, tmp_path: Path) -> None:
    """Than the model does when it is rounded as it is, on the same images; at the default rate YOLOS's moves little."""
    model, student, plain = _wrapped(name), tmp_path / "student.safetensors", tmp_path / "plain.safetensors"
    formats = FormatsOf(CalibrateRecipe(model="demo", scheme="w4a4"))
    made = PsaqV2(learning_rate=3e-4).generate(model, GenerateOptions(8, formats=formats))
    made.save(student)
    ImageSet.of(made.pixels, made.preprocess, source=made.source).save(plain)
    asked = {"scheme": "w4a4", "refine": "none", "images": str(plain)}
    found = [dfq.simulate(model, tmp_path / calib.stem, calib=str(calib), **asked) for calib in (student, plain)]
    assert found[0].sqnr_db > found[1].sqnr_db + 0.1
