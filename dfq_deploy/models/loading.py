"""Loading: the one way from a name and its weights to a `Model`."""

import contextlib
import difflib
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, resolve_model_data_config
from timm.models import get_arch_pretrained_cfgs
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from calibrators.errors import ModelError
from calibrators.preprocess import Preprocess
from calibrators.registry import names, pick
from calibrators.sites import SitedConv2d, attach_sites, sites_of
from dfq_deploy.models import ALIASES, Model
from dfq_deploy.models.checkpoint import first_line, load_checkpoint
from dfq_deploy.models.hub import check_hub
from dfq_deploy.recipe import ModelRecipe, size_of
from exporters.outputs import Output

__all__ = ["attach_families", "fingerprint_of_weights", "load_model", "model_of"]

_DEMO = Path(__file__).parent / "demo"
_DEMO_LAYERS = {"classifier": "head", "first_conv": "patch_embed.proj"}
_FAMILIES = "dfq_deploy.models.families"


def load_model(
    name: str,
    *,
    checkpoint: Path | None = None,
    random_weights: bool = False,
    seed: int = 0,
    size: tuple[int, int] | None = None,
) -> Model:
    """The model `name` with its weights, sited.

    Args:
        name: A timm name, one of `ALIASES`, or `demo`.
        checkpoint: Weights to use instead of the hub's; of other classes or channels, too, but for an .npz.
        random_weights: Use no trained weights at all; norms and biases are drawn too.
        seed: Seed of the random weights.
        size: Height and width of its images, if not the model's own; what depends on them is resampled.

    Raises:
        ModelError: The name is unknown, the weights can't be had, they do not fit, or images of that size do not.
    """
    name = ALIASES.get(name, name)
    hub = checkpoint is None and not random_weights
    if name == "demo":
        make, labelled = functools.partial(_demo, seed, size), _DEMO / "held_back.npz"
        checkpoint = _DEMO / "weights.safetensors" if hub else checkpoint
    else:
        _check_name(name)
        if hub:
            check_hub(name)
        make, labelled = functools.partial(_create, name, pretrained=hub, seed=seed, size=size), None
    if checkpoint is not None:
        module = load_checkpoint(make, checkpoint, resize=size is not None)
    else:
        module = make()
        if random_weights:
            _draw_norms_and_biases(module, seed)
    module.eval().requires_grad_(False)
    if size is not None:
        _check_patches(name, module, size)
    preprocess = _preprocess(module)
    fingerprint = fingerprint_of_weights(name if size is None else f"{name} at {size[0]}x{size[1]}", module)
    order = _order_of(name, module, preprocess)
    attach_sites(module, leave={layer for layer in order if order.count(layer) > 1})
    first = next((layer for layer in order if f"{layer}.input" in sites_of(module)), "")
    if first:
        _fix_image_range(module.get_submodule(first), preprocess)
    attach_families(module)
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
        first=first,
    )


def attach_families(module: nn.Module) -> None:
    """Give every attention that a family's file knows what that file gives it, in place."""
    for family in names(_FAMILIES):
        pick(_FAMILIES, family).attach_attention(module)


def model_of(recipe: ModelRecipe) -> Model:
    """The model that `recipe` names.

    Raises:
        ModelError: The name is unknown, the weights can't be had, or they do not fit.
    """
    return load_model(
        recipe.model,
        checkpoint=recipe.checkpoint,
        random_weights=recipe.random_weights,
        seed=recipe.seed,
        size=size_of(recipe.size),
    )


def _check_patches(name: str, module: nn.Module, size: tuple[int, int]) -> None:
    """Return unless patches would leave out the rims of images: what timm then reads it was not trained on."""
    patch = getattr(getattr(module, "patch_embed", None), "patch_size", None)
    if isinstance(patch, tuple) and any(edge % step for edge, step in zip(size, patch, strict=True)):
        raise _wrong_size(name, size, ValueError(f"patches of {patch[0]}x{patch[1]} do not divide it"))


def _fix_image_range(first: nn.Module, preprocess: Preprocess) -> None:
    """The layer that reads the image sees pixels between black and white: its range needs no data."""
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


def _create(name: str, *, pretrained: bool, seed: int, size: tuple[int, int] | None, **changes: Any) -> nn.Module:
    """The model `name` of timm with its first weights; `changes` are `num_classes` and `in_chans`, if not its own."""
    overlay = None if size is None else {"input_size": (changes.get("in_chans", 3), *size)}
    try:
        with _seeded(seed):
            module: nn.Module = timm.create_model(
                name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **changes
            )
    except Exception as cause:  # constructors that are asked for what they cannot do raise whatever they like
        if size is not None and not isinstance(cause, OSError):  # as the hub's are
            raise _wrong_size(name, size, cause) from cause
        asked = " and ".join(f"{what}={value}" for what, value in changes.items())
        raise ModelError(
            what=f"`{name}` could not be created{asked and f' with {asked}, as the checkpoint has it'}.",
            why=first_line(cause),
            fix="pass a checkpoint with timm's own." if asked else "pass --checkpoint FILE with its weights.",
        ) from cause
    if "in_chans" in changes:
        facts: Any = module.pretrained_cfg
        facts["input_size"] = (changes["in_chans"], *facts["input_size"][1:])
    return module


def _demo(seed: int, size: tuple[int, int] | None, **changes: Any) -> nn.Module:
    """The digits demo: a ViT of 0.2 M parameters, see examples/train_demo.py."""
    size, changes = size or (32, 32), {"num_classes": 10, **changes}
    with _seeded(seed):
        module = VisionTransformer(img_size=size, patch_size=4, embed_dim=64, depth=4, num_heads=4, **changes)
    shape = (changes.get("in_chans", 3), *size)
    facts: Any = {
        "input_size": shape,
        "crop_pct": 1.0,
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        **_DEMO_LAYERS,
    }
    module.pretrained_cfg = facts
    return module


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Initial weights come from torch's global generator: give it a seed, and leave it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _preprocess(module: nn.Module) -> Preprocess:
    facts = resolve_model_data_config(module)
    channels, height, width = facts["input_size"]
    return Preprocess(
        size=(height, width),
        crop_pct=facts["crop_pct"],
        crop_mode=facts["crop_mode"],
        interpolation=facts["interpolation"],
        mean=_per_channel(facts["mean"], channels),
        std=_per_channel(facts["std"], channels),
    )


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """`values` of red, green and blue; where the model reads other channels, their mean for each."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _order_of(name: str, module: nn.Module, preprocess: Preprocess) -> list[str]:
    """The layers in the order in which they run; some run several times, and stay float, since a site is one tensor.

    Raises:
        ModelError: An image of that size does not pass: windows or strides do not divide it.
    """
    calls: list[str] = []
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for layer, inner in module.named_modules():
            if type(inner) in (nn.Linear, nn.Conv2d):
                hook = inner.register_forward_pre_hook(lambda _layer, _inputs, layer=layer: calls.append(layer))
                hooks.callback(hook.remove)
        try:
            module(torch.zeros(1, *preprocess.shape))
        except Exception as cause:  # of a shape that does not fit, from any layer
            raise _wrong_size(name, preprocess.size, cause) from cause
    return calls


def _wrong_size(name: str, size: tuple[int, int], cause: Exception) -> ModelError:
    return ModelError(
        what=f"`{name}` takes no images of {size[0]}x{size[1]}.",
        why=f"{type(cause).__name__}: {first_line(cause)}",
        fix="pass a --size that its patches, strides and windows divide, or none for its own; or pick another variant.",
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
