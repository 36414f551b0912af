"""Weights from a file: safetensors, a torch checkpoint read with `weights_only=True`, or Google's `.npz`.

Every way in which a file can fail to fit is told with the tensor's name; nothing is loaded in part.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from calibrators.errors import ModelError

__all__ = ["first_line", "load_checkpoint"]


def load_checkpoint(make: Callable[..., nn.Module], path: Path, *, resize: bool = False) -> nn.Module:
    """The model that `make` gives with the weights in `path`, all of them or none.

    A head of other classes and a first convolution of other channels make the model one with those.

    Args:
        make: Makes the model; takes `num_classes` and `in_chans`.
        path: The file.
        resize: Resample what depends on the size of the images, but for an .npz; else it must fit, unless it has an
            original release's names.

    Raises:
        ModelError: The file is missing, truncated or unsafe, or a tensor is missing, left over, of another shape,
            or holds NaN or Inf.
    """
    if not path.is_file():
        raise ModelError(
            what=f"there is no checkpoint `{path}`.",
            why="the file does not exist.",
            fix="check --checkpoint.",
        )
    module = make()
    if path.suffix == ".npz":
        _load_npz(module, path)
        _check_values(module.state_dict(), path)
        return module
    held = _read(path)
    weights = _fitted(module, held, resize=resize)
    if changes := _changes(module, weights):
        module = make(**changes)
        weights = _fitted(module, held, resize=resize)
    _check_values(weights, path)
    _check_names_and_shapes(module, weights, path)
    module.load_state_dict(weights, strict=True)
    return module


def _read(path: Path) -> dict[str, Tensor]:
    try:
        weights = load_state_dict(str(path), device="cpu", weights_only=True)
        if not weights or not all(isinstance(w, Tensor) for w in weights.values()):
            raise ValueError(type(weights))
    except Exception as cause:  # bytes that are no checkpoint raise whatever they lead the readers to
        raise ModelError(
            what=f"`{path}` cannot be read as weights.",
            why=f"it is truncated, not a checkpoint, or holds more than tensors ({first_line(cause)}).",
            fix="pass a whole .safetensors, .pth or .npz file with a state dict.",
        ) from cause
    return dict(weights)


def _fitted(module: nn.Module, weights: dict[str, Tensor], *, resize: bool) -> dict[str, Tensor]:
    """`weights` under timm's names: original releases pass the model's own filter, which resamples, too."""
    filter_fn = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    wanted = module.state_dict()
    named = weights.keys() == wanted.keys()
    if filter_fn is None or (named and not (resize and any(weights[k].shape != wanted[k].shape for k in wanted))):
        return weights
    if _other_patches(module, weights):
        return weights  # which the filter would resample: the comparison of shapes tells it
    try:
        return dict(filter_fn(weights, module))
    except Exception:  # timm's filters raise whatever tensors that do not fit lead them to
        return weights  # another model's weights: the comparison of names tells it better


def _other_patches(module: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Whether the first convolution of `weights` has another kernel than that of `module`."""
    return any(
        there is not None and here is not None and there.ndim == here.ndim and there.shape[2:] != here.shape[2:]
        for there, here in _weights_of("first_conv", module, weights)
    )


def _weights_of(
    fact: str, module: nn.Module, weights: dict[str, Tensor]
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """The weight in `weights`, and that of `module`, of each layer that timm's configuration names as `fact`."""
    places = getattr(module, "pretrained_cfg", {}).get(fact) or ()
    own = module.state_dict()
    for place in (places,) if isinstance(places, str) else places:
        yield weights.get(f"{place}.weight"), own.get(f"{place}.weight")


def _changes(module: nn.Module, weights: dict[str, Tensor]) -> dict[str, int]:
    """What `weights` have other than `module`: `num_classes` by the classifier, `in_chans` by the first convolution."""
    found = {}
    for change, axis, fact in (("num_classes", 0, "classifier"), ("in_chans", 1, "first_conv")):
        for there, here in _weights_of(fact, module, weights):
            if there is None or (here is None and axis) or (here is not None and here.ndim != there.ndim):
                continue
            if here is None or here.shape[axis] != there.shape[axis]:
                found[change] = there.shape[axis]
    return found


def _load_npz(module: nn.Module, path: Path) -> None:
    try:
        with np.load(path, allow_pickle=False) as archive:
            classes = archive["head/bias"].shape[0] if "head/bias" in archive else 0
            held = sum(array.size for array in archive.values())
        if classes != getattr(module, "num_classes", 0):
            misfit = f"it has {classes} classes in its head"
            raise ValueError(misfit)
        wanted = sum(tensor.numel() for tensor in module.state_dict().values())
        if held != wanted:  # timm would skip what is left over, and resize or repeat what is of another shape
            misfit = f"it holds {held} numbers, the model {wanted}"
            raise ValueError(misfit)
        module.load_pretrained(str(path))  # type: ignore[operator]
    except Exception as cause:  # bytes that are no archive, or of another model, raise whatever they lead timm to
        raise ModelError(
            what=f"`{path}` cannot be loaded into this model.",
            why=f"{type(cause).__name__}: {first_line(cause)}.",
            fix="pass Google's .npz of the same architecture, number of classes and size of images (an .npz is not "
            "resampled for --size), or a .safetensors file.",
        ) from cause


def _check_names_and_shapes(module: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    wanted = module.state_dict()
    missing, extra = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or extra:
        raise ModelError(
            what=f"`{path}` holds the weights of another model.",
            why=f"{len(missing)} tensors are missing ({_some(missing)}), {len(extra)} are left over ({_some(extra)}).",
            fix="pass the --model that the file was made from.",
        )
    for name, tensor in wanted.items():
        if tensor.shape != weights[name].shape:
            head = name.startswith(("head", "classifier", "fc"))
            raise ModelError(
                what=f"`{name}` has shape {tuple(weights[name].shape)} in `{path}`, not {tuple(tensor.shape)}.",
                why="the file has another number of classes." if head else "the file is of another architecture.",
                fix="pass the --model that the file was made from.",
            )


def _check_values(weights: dict[str, Tensor], path: Path) -> None:
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(
                what=f"`{name}` in `{path}` holds NaN or Inf.",
                why="the training diverged or the file is damaged.",
                fix="pass another copy of the weights.",
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "") if names else "none"


def first_line(cause: BaseException) -> str:
    """The first line of an error's message, cut to a readable length."""
    return str(cause).strip().split("\n")[0][:300]
