"""Loading: the one way from a name and its weights to a `Model`."""

import contextlib
import difflib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from timm.data import ImageNetInfo, resolve_model_data_config
from timm.models import get_arch_pretrained_cfgs
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from calibrators.errors import ModelError
from calibrators.preprocess import Preprocess
from calibrators.registry import names, pick
from calibrators.sites import SitedConv2d, SitedLinear, attach_sites
from dfq_deploy.models import ALIASES, Model
from dfq_deploy.models.checkpoint import load_checkpoint
from dfq_deploy.models.hub import check_hub
from dfq_deploy.recipe import ModelRecipe
from exporters.outputs import Output

__all__ = ["fingerprint_of_weights", "load_model", "model_of"]

_DEMO = Path(__file__).parent / "demo"
_FAMILIES = "dfq_deploy.models.families"


def load_model(name: str, *, checkpoint: Path | None = None, random_weights: bool = False, seed: int = 0) -> Model:
    """The model `name` with its weights, sited.

    Args:
        name: A timm name, one of `ALIASES`, or `demo`.
        checkpoint: Weights to use instead of the hub's.
        random_weights: Use no trained weights at all; norms and biases are drawn too.
        seed: Seed of the random weights.

    Raises:
        ModelError: The name is unknown, the weights can't be had, or they do not fit.
    """
    name = ALIASES.get(name, name)
    hub = checkpoint is None and not random_weights
    if name == "demo":
        module, preprocess, labelled = _demo(seed), _DEMO_PREPROCESS, _DEMO / "held_back.npz"
        checkpoint = _DEMO / "weights.safetensors" if hub else checkpoint
    else:
        _check_name(name)
        if hub:
            check_hub(name)
        module = _create(name, pretrained=hub, seed=seed)
        preprocess, labelled = _preprocess(module), None
    if checkpoint is not None:
        load_checkpoint(module, checkpoint)
    elif random_weights:
        _draw_norms_and_biases(module, seed)
    module.eval().requires_grad_(False)
    fingerprint = fingerprint_of_weights(name, module)
    attach_sites(module)
    _fix_image_range(module, preprocess)
    for family in names(_FAMILIES):
        pick(_FAMILIES, family).attach_attention(module)
    classes = int(getattr(module, "num_classes", 0))
    return Model(
        name=name,
        module=module,
        preprocess=preprocess,
        fingerprint=fingerprint,
        classes=classes,
        class_names=_class_names(name, classes),
        classifiers=_classifiers(module) if classes else (),
        labelled=labelled,
        task="classification" if classes else "features",
        outputs=() if classes else _features(module, preprocess),
    )


def model_of(recipe: ModelRecipe) -> Model:
    """The model that `recipe` names.

    Raises:
        ModelError: The name is unknown, the weights can't be had, or they do not fit.
    """
    return load_model(
        recipe.model, checkpoint=recipe.checkpoint, random_weights=recipe.random_weights, seed=recipe.seed
    )


def _fix_image_range(module: nn.Module, preprocess: Preprocess) -> None:
    """The layer that reads the image sees pixels between black and white: its range needs no data."""
    first = next((layer for layer in module.modules() if isinstance(layer, SitedConv2d | SitedLinear)), None)
    if isinstance(first, SitedConv2d) and first.in_channels == preprocess.shape[0]:
        black, white = preprocess.bounds
        first.input_site.fixed = float(black.min()), float(white.max())


def _check_name(name: str) -> None:
    architecture, dot, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, [*ALIASES, "demo", *timm.list_models()], n=5)
        raise ModelError(
            what=f"timm has no model named `{name}`.",
            why=f"names like it: {', '.join(close)}." if close else "no name is like it.",
            fix=f"pass a name from timm.list_models(), or one of {', '.join([*ALIASES, 'demo'])}.",
        )
    known = get_arch_pretrained_cfgs(architecture)
    if dot and name not in known:
        raise ModelError(
            what=f"timm's `{architecture}` has no pretrained tag `{tag}`.",
            why=f"timm has {', '.join(known)}.",
            fix="pass one of those.",
        )


def _create(name: str, *, pretrained: bool, seed: int) -> nn.Module:
    try:
        with _seeded(seed):
            module: nn.Module = timm.create_model(name, pretrained=pretrained)
    except (OSError, RuntimeError) as cause:
        raise ModelError(
            what=f"`{name}` could not be created.",
            why=str(cause),
            fix="pass --checkpoint FILE with its weights.",
        ) from cause
    return module


_DEMO_PREPROCESS = Preprocess((32, 32), 1.0, "center", "bicubic", (0.5,) * 3, (0.5,) * 3)


def _demo(seed: int) -> nn.Module:
    """The digits demo: a ViT of 0.2 M parameters, see examples/train_demo.py."""
    with _seeded(seed):
        return VisionTransformer(img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=4, num_classes=10)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Initial weights come from torch's global generator: give it a seed, and leave it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _preprocess(module: nn.Module) -> Preprocess:
    facts = resolve_model_data_config(module)
    return Preprocess(
        size=tuple(facts["input_size"][1:]),
        crop_pct=facts["crop_pct"],
        crop_mode=facts["crop_mode"],
        interpolation=facts["interpolation"],
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
    )


def _draw_norms_and_biases(module: nn.Module, seed: int) -> None:
    """Move every one-dimensional parameter off the 0 or 1 that it starts at; simplifiers delete those."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def _features(module: nn.Module, preprocess: Preprocess) -> tuple[Output, ...]:
    """What a model without a classifier puts out."""
    with torch.no_grad():
        found = module(torch.zeros(1, *preprocess.shape))
    return (Output("features", tuple(found.shape[1:])),)


def _class_names(name: str, classes: int) -> tuple[str, ...] | None:
    if name == "demo":
        return tuple(map(str, range(classes)))
    if classes != 1000:
        return None
    imagenet = ImageNetInfo("imagenet-1k")
    return tuple(imagenet.index_to_description(index) for index in range(classes))


def _classifiers(module: nn.Module) -> tuple[str, ...]:
    names = getattr(module, "pretrained_cfg", {}).get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def fingerprint_of_weights(name: str, module: nn.Module) -> str:
    """SHA-256 over the name and every weight."""
    digest = hashlib.sha256(name.encode())
    for key, tensor in module.state_dict().items():
        digest.update(key.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
