"""Models: names that are helped along, weights that fit or are refused, and a demo that knows its digits."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from calibrators.errors import ModelError
from calibrators.registry import pick
from dfq_deploy.models import ALIASES, hub
from dfq_deploy.models.checkpoint import load_checkpoint
from dfq_deploy.models.loading import load_model
from exporters.outputs import Output

Weights = dict[str, Tensor]


def _refusal(load: Callable[[], object]) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load()
    assert len(str(caught.value).splitlines()) == 3
    return caught.value


# --- names ---


@pytest.mark.parametrize("name", ALIASES.values(), ids=ALIASES.keys())
def test_an_alias_is_a_tagged_name_of_an_imagenet_classifier(name: str) -> None:
    config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    assert config is not None
    assert name == f"{config.architecture}.{config.tag}"
    assert config.has_weights
    assert (config.num_classes, config.input_size) == (1000, (3, 224, 224))


@pytest.mark.parametrize(
    ("name", "close"), [("vit_tinny_patch16_224", "vit_tiny_patch16_224"), ("deit_tt", "deit_t"), ("demos", "demo")]
)
def test_an_unknown_name_suggests_close_ones(name: str, close: str) -> None:
    refusal = _refusal(lambda: load_model(name))
    assert f"`{name}`" in refusal.what
    assert f" {close}," in refusal.why.replace(".", ",")


def test_an_unknown_tag_is_told_with_those_that_there_are() -> None:
    refusal = _refusal(lambda: load_model("test_vit.nonsense"))
    assert "`nonsense`" in refusal.what
    assert "test_vit.r160_in1k" in refusal.why


def test_a_model_without_a_classifier_puts_out_features() -> None:
    model = load_model("eva02_tiny_patch14_224", random_weights=True)
    assert (model.task, model.classes, model.classifiers) == ("features", 0, ())
    assert model.outputs == (Output("features", (192,)),)


# --- the hub ---


@pytest.fixture
def out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_resolves", lambda _host: False)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("urllib.request.getproxies", dict)


@pytest.mark.usefixtures("out_of_reach")
@pytest.mark.parametrize("name", ["vit_t", "test_vit", "swin_tiny_patch4_window7_224"])
def test_without_hub_and_cache_the_way_out_is_a_checkpoint(name: str) -> None:
    refusal = _refusal(lambda: load_model(name))
    assert "cannot be fetched" in refusal.what
    assert "--checkpoint" in refusal.fix


@pytest.mark.usefixtures("out_of_reach")
def test_a_cached_model_needs_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: "model.safetensors")
    hub.check_hub("test_vit")


def test_weights_that_were_never_published_are_not_waited_for(out_of_reach: None) -> None:
    refusal = _refusal(lambda: load_model("vit_small_patch16_36x1_224"))
    assert "no pretrained weights" in refusal.what
    assert "--random-weights" in refusal.fix


# --- --checkpoint ---


@pytest.fixture(scope="module")
def trained() -> Weights:
    """Weights of a `test_vit`, all of them off their first values."""
    return load_model("test_vit", random_weights=True, seed=7).module.state_dict()


@pytest.fixture(params=["weights.safetensors", "weights.pth"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


def _save(weights: Weights, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    else:
        torch.save(weights, path)
    return path


def _without(weights: Weights, name: str) -> Weights:
    return {key: tensor for key, tensor in weights.items() if key != name}


def test_a_checkpoint_is_loaded_to_the_last_bit(trained: Weights, file: Path) -> None:
    loaded = load_model("test_vit", checkpoint=_save(trained, file)).module.state_dict()
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trained.items())


def test_a_checkpoint_of_a_training_run_is_unwrapped(trained: Weights, tmp_path: Path) -> None:
    wrapped = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in trained.items()}}
    torch.save(wrapped, tmp_path / "run.pth")
    loaded = load_model("test_vit", checkpoint=tmp_path / "run.pth").module.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trained.items())


def test_weights_of_other_patches_are_not_resampled(tmp_path: Path) -> None:
    weights = load_model("demo").module.state_dict()
    weights["patch_embed.proj.weight"] = torch.zeros(64, 3, 8, 8)
    path = _save(weights, tmp_path / "weights.safetensors")
    for size in (None, (32, 32)):
        refusal = _refusal(lambda size=size: load_model("demo", checkpoint=path, size=size))
        assert "`patch_embed.proj.weight` has shape (64, 3, 8, 8)" in refusal.what


def test_a_size_that_patches_do_not_divide_is_refused() -> None:
    assert "patches of 4x4 do not divide it" in _refusal(lambda: load_model("demo", size=(32, 18))).why
    assert load_model("demo", size=(32, 24)).preprocess.size == (32, 24)


Change = Callable[[Weights], Weights]
CHANGES: dict[str, tuple[Change, str]] = {
    "missing": (lambda w: _without(w, "norm.bias"), "1 tensors are missing (norm.bias)"),
    "left over": (lambda w: w | {"spare": torch.zeros(2)}, "1 are left over (spare)"),
    "shape": (lambda w: w | {"norm.bias": torch.zeros(63)}, "another architecture"),
    "classes": (lambda w: w | {"head.bias": torch.zeros(10)}, "number of classes"),
    "size": (lambda w: w | {"pos_embed": torch.zeros(1, 50, 64)}, "another architecture"),
    "nan": (lambda w: w | {"norm.bias": torch.full((64,), np.nan)}, "the file is damaged"),
    "inf": (lambda w: w | {"norm.bias": torch.full((64,), -np.inf)}, "the file is damaged"),
    "other model": (
        lambda _: timm.create_model("test_convnext").state_dict(),
        "tensors are missing (blocks.0.attn.proj.bias, ",
    ),
}


@pytest.mark.parametrize(("change", "why"), CHANGES.values(), ids=CHANGES.keys())
def test_weights_that_do_not_fit_are_refused(trained: Weights, file: Path, change: Change, why: str) -> None:
    _save(change(trained), file)
    assert why in _refusal(lambda: load_model("test_vit", checkpoint=file)).why


@pytest.mark.parametrize("kept", [0, 9, 5000, -1])
def test_a_truncated_checkpoint_is_refused(trained: Weights, file: Path, kept: int) -> None:
    file.write_bytes(_save(trained, file).read_bytes()[:kept])
    assert file.name in _refusal(lambda: load_model("test_vit", checkpoint=file)).what


@pytest.mark.parametrize("content", [[1], {}, {"epoch": 3}, {1: torch.zeros(2)}, torch.zeros(2), None], ids=str)
def test_a_torch_file_of_something_else_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pth")
    assert "cannot be read" in _refusal(lambda: load_model("test_vit", checkpoint=tmp_path / "other.pth")).what


@pytest.mark.parametrize("name", ["notes.txt", "notes.pth", "notes.safetensors", "notes.npz"])
def test_a_text_file_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("hello")
    assert name in _refusal(lambda: load_model("test_vit", checkpoint=tmp_path / name)).what


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("test_vit", {"num_classes": 7, "in_chans": 5}),
        ("levit_128s", {"num_classes": 7}),
        ("resnet18", {"in_chans": 1}),
        ("eva02_tiny_patch14_224", {"num_classes": 3}),
    ],
)
def test_classes_and_channels_are_those_of_the_checkpoint(name: str, change: dict[str, int], file: Path) -> None:
    wanted = timm.create_model(name, **change).state_dict()
    loaded = load_model(name, checkpoint=_save(wanted, file))
    assert (loaded.classes, loaded.preprocess.shape[0]) == (change.get("num_classes", 1000), change.get("in_chans", 3))
    assert loaded.module(torch.zeros(2, *loaded.preprocess.shape)).shape == (2, loaded.classes)
    kept = loaded.module.state_dict()
    assert all(torch.equal(kept[key], value) for key, value in wanted.items() if key in kept)
    assert (
        np.allclose(
            loaded.preprocess.mean,
            np.mean(
                load_model(name.replace("eva02_tiny_patch14_224", "test_vit"), random_weights=True).preprocess.mean
            ),
        )
        or loaded.preprocess.shape[0] == 3
    )


class _Bomb:
    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.crater),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(tmp_path: Path, zipped: bool) -> None:
    bomb, crater = tmp_path / "bomb.pth", tmp_path / "crater"
    torch.save({"head.bias": _Bomb(crater)}, bomb, _use_new_zipfile_serialization=zipped)
    _refusal(lambda: load_model("test_vit", checkpoint=bomb))
    assert not crater.exists()


def test_a_missing_checkpoint_is_told(tmp_path: Path) -> None:
    assert "no checkpoint" in _refusal(lambda: load_model("test_vit", checkpoint=tmp_path / "none.pth")).what


# --- Google's .npz ---


def _googles(**sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**{**small, **sizes})


def _in_googles_names(module: nn.Module) -> dict[str, np.ndarray]:
    """The weights of a ViT under the names and in the shapes of Google's files."""
    weights = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    width, heads = module.embed_dim, module.blocks[0].attn.num_heads
    block_of = {f"blocks.{i}": f"Transformer/encoderblock_{i}" for i in range(len(module.blocks))}
    google = {
        "cls": weights["cls_token"],
        "Transformer/posembed_input/pos_embedding": weights["pos_embed"],
        "embedding/kernel": weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": weights["patch_embed.proj.bias"],
    }
    norms = {"norm": "Transformer/encoder_norm"}
    dense = {"head": "head"}
    for ours, theirs in block_of.items():
        norms |= {f"{ours}.norm1": f"{theirs}/LayerNorm_0", f"{ours}.norm2": f"{theirs}/LayerNorm_2"}
        dense |= {f"{ours}.mlp.fc{i + 1}": f"{theirs}/MlpBlock_3/Dense_{i}" for i in range(2)}
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        parts = zip(
            ("query", "key", "value"),
            np.split(weights[f"{ours}.attn.qkv.weight"], 3),
            np.split(weights[f"{ours}.attn.qkv.bias"], 3),
            strict=True,
        )
        for name, weight, bias in parts:
            google[f"{attention}/{name}/kernel"] = weight.T.reshape(width, heads, -1)
            google[f"{attention}/{name}/bias"] = bias.reshape(heads, -1)
        google[f"{attention}/out/kernel"] = weights[f"{ours}.attn.proj.weight"].T.reshape(heads, -1, width)
        google[f"{attention}/out/bias"] = weights[f"{ours}.attn.proj.bias"]
    for ours, theirs in norms.items():
        google |= {f"{theirs}/scale": weights[f"{ours}.weight"], f"{theirs}/bias": weights[f"{ours}.bias"]}
    for ours, theirs in dense.items():
        google |= {f"{theirs}/kernel": weights[f"{ours}.weight"].T, f"{theirs}/bias": weights[f"{ours}.bias"]}
    return google


def test_googles_weights_are_loaded_to_the_last_bit(tmp_path: Path) -> None:
    trained = _googles()
    for parameter in trained.parameters():
        nn.init.normal_(parameter)
    np.savez(tmp_path / "google.npz", **_in_googles_names(trained))
    module = load_checkpoint(_googles, tmp_path / "google.npz")
    assert all(torch.equal(*pair) for pair in zip(module.parameters(), trained.parameters(), strict=True))


@pytest.mark.parametrize(
    "other",
    [{"patch_size": 16}, {"img_size": 64}, {"embed_dim": 64}, {"depth": 1}, {"depth": 3}, {"num_classes": 6}],
    ids=str,
)
def test_googles_weights_of_another_architecture_are_refused(tmp_path: Path, other: dict[str, int]) -> None:
    np.savez(tmp_path / "google.npz", **_in_googles_names(_googles(**other)))
    assert "google.npz" in _refusal(lambda: load_checkpoint(_googles, tmp_path / "google.npz")).what


@pytest.mark.parametrize("change", [{"head/bias": np.full(5, np.nan, np.float32)}, {"spare": np.zeros(1)}], ids=str)
def test_googles_weights_with_nan_or_more_than_fits_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    np.savez(tmp_path / "google.npz", **{**_in_googles_names(_googles()), **change})
    _refusal(lambda: load_checkpoint(_googles, tmp_path / "google.npz"))


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_truncated_archive_of_weights_is_refused(tmp_path: Path, kept: int) -> None:
    np.savez(tmp_path / "google.npz", **_in_googles_names(_googles()))
    (tmp_path / "google.npz").write_bytes((tmp_path / "google.npz").read_bytes()[:kept])
    _refusal(lambda: load_checkpoint(_googles, tmp_path / "google.npz"))


# --- random weights and the demo ---


@pytest.mark.parametrize("name", ["test_vit", "demo"])
def test_random_weights_follow_their_seed(name: str) -> None:
    one, again, other = (load_model(name, random_weights=True, seed=seed) for seed in (1, 1, 2))
    assert one.fingerprint == again.fingerprint != other.fingerprint


def test_random_weights_leave_nothing_that_a_simplifier_would_delete() -> None:
    parameters = load_model("test_vit", random_weights=True).module.named_parameters()
    vectors = {name: values for name, values in parameters if values.ndim == 1}
    assert len(vectors) > 40
    assert not [name for name, values in vectors.items() if ((values == 0) | (values == 1)).any()]


def test_the_demos_random_weights_are_not_the_trained_ones() -> None:
    trained, random = (load_model("demo", random_weights=drawn).module for drawn in (False, True))
    assert not torch.allclose(trained.head.weight, random.head.weight, atol=0.1)


def test_a_loaded_model_is_frozen_and_says_what_it_is(trained: Weights, tmp_path: Path) -> None:
    model = load_model("test_vit", checkpoint=_save(trained, tmp_path / "weights.safetensors"))
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert (model.name, model.classes, model.classifiers) == ("test_vit", 1000, ("head",))
    assert model.class_names is not None
    assert model.class_names[1] == "goldfish, Carassius auratus"
    assert model.preprocess.shape == (3, 160, 160)


@torch.inference_mode()
def test_the_demo_reads_its_held_back_digits() -> None:
    model = load_model("demo")
    assert model.labelled is not None
    images = pick("calibrators.sources", "npz").open_images(model.labelled, model.preprocess)
    logits = torch.cat([model.module(torch.from_numpy(batch)) for batch in images.batches(60)])
    assert len(images) == 360
    assert (logits.argmax(1).numpy() == images.labels).mean() >= 0.97
    assert model.class_names == tuple("0123456789")
