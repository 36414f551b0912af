"""Blocks of a model, found by its structure, and reconstructed one after the other.

A block is an element of a list or sequence of modules that has two sited Linear layers or more, and no such element in
it: the transformer blocks of any timm model, in however many stages. What lies between them keeps its weights and
ranges. The quantized model runs once for all blocks; when it reaches one, that is reconstructed and then goes on.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calibrators.errors import PlanError
from calibrators.images import ImageSet
from calibrators.plan import QParams
from calibrators.refine import Block
from calibrators.registry import pick
from calibrators.sites import Mode, SitedLinear, set_mode

__all__ = ["blocks_of", "reconstruct"]

_IMAGES = 64  # that blocks are fitted to; memory grows with the number
_BATCH = 8  # images per forward pass
_PROBE = 3  # images of a first pass: another number shows which arguments have an entry for each


def blocks_of(module: nn.Module) -> dict[str, nn.Module]:
    """The blocks of `module`, by name."""
    found = {
        f"{name}.{place}": child
        for name, parent in module.named_modules()
        if isinstance(parent, nn.Sequential | nn.ModuleList)
        for place, child in parent.named_children()
        if sum(isinstance(layer, SitedLinear) for layer in child.modules()) > 1
    }
    return {name: block for name, block in found.items() if not any(other.startswith(f"{name}.") for other in found)}


def reconstruct(
    module: nn.Module,
    floats: nn.Module,
    plan: Mapping[str, QParams],
    images: ImageSet,
    names: Sequence[str],
    progress: Callable[[int, int, Mapping[str, float]], object] = lambda *_: None,
) -> dict[str, QParams]:
    """Apply the reconstructions `names` to every block of `module`, in place and in the model's order.

    Args:
        module: The model with the weights to begin with.
        floats: The model whose blocks are to be reconstructed, of the same structure.
        plan: Number formats by site.
        images: Calibration images.
        names: The passes.
        progress: Called with blocks done and in all, and a block's loss at the first and the last step.

    Returns:
        The plan's sites, with the scales as the reconstructions left them. The weights lie on their codes.

    Raises:
        PlanError: The model has no blocks, or one that takes or puts out more than one tensor of the images.
    """
    blocks = blocks_of(module)
    if not blocks:
        raise PlanError(
            what=f"{' and '.join(names)} finds no blocks in this model.",
            why="it looks for lists of modules with two Linear layers or more in each.",
            fix="leave it out of --refine.",
        )
    pixels = torch.from_numpy(images.spread(_IMAGES).pixels[:])
    wanted = _outputs(floats, list(blocks), pixels)
    settled = dict(plan)

    def arrive(name: str, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        del blocks[name].forward  # from here on it computes as its class does
        own = {key: value.clone() for key, value in blocks[name].state_dict().items()}  # others may share what it has
        blocks[name].load_state_dict(own, assign=True)
        compute = functools.partial(_computed, blocks[name], rest, more)
        block = Block(blocks[name], name, compute, x, wanted.pop(name), settled)
        for one in names:
            pick("calibrators.refine", one).reconstruct(block)
        settled.update(block.sites)
        progress(len(blocks) - len(wanted), len(blocks), {"first": block.losses[0], "last": block.losses[-1]})
        return torch.cat([compute(part) for part in torch.split(x, _BATCH)])

    set_mode(module, Mode.FAKE, qparams=plan)
    try:
        for name, block in blocks.items():
            block.forward = functools.partial(arrive, name)
        with torch.no_grad():
            module(pixels)
    finally:
        set_mode(module, Mode.OFF)
        for block in blocks.values():
            vars(block).pop("forward", None)
    return settled


def _computed(block: nn.Module, rest: tuple[Any, ...], more: Mapping[str, Any], x: Tensor) -> Tensor:
    found: Tensor = block(x, *rest, **more)
    return found


def _outputs(module: nn.Module, names: Sequence[str], pixels: Tensor) -> dict[str, Tensor]:
    """What each of the modules `names` puts out for all of `pixels`.

    Raises:
        PlanError: One of them takes or puts out more than one tensor of the images.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    others: dict[str, set[int]] = {}  # arguments beside the first that have an entry for each of its entries

    def keep(name: str, _module: nn.Module, inputs: tuple[Any, ...], more: Mapping[str, Any], output: Any) -> None:
        if not inputs or not isinstance(output, Tensor):
            raise _unfit(name)
        found[name].append(output)
        beside = [one for one in (*inputs[1:], *more.values()) if isinstance(one, Tensor) and one.ndim]
        if len(inputs[0]) > 1:
            alike = {place for place, one in enumerate(beside) if len(one) == len(inputs[0])}
            others[name] = others.get(name, alike) & alike

    hooks = [
        module.get_submodule(name).register_forward_hook(functools.partial(keep, name), with_kwargs=True)
        for name in names
    ]
    try:
        with torch.no_grad():
            for part in (pixels[: max(1, min(_PROBE, len(pixels) - 1))], *torch.split(pixels, _BATCH)):
                module(part)
    finally:
        for hook in hooks:
            hook.remove()
    if mixed := [name for name, places in others.items() if places]:
        raise _unfit(mixed[0])
    return {name: torch.cat(parts[1:]) for name, parts in found.items()}


def _unfit(name: str) -> PlanError:
    return PlanError(
        what=f"the block `{name}` cannot be reconstructed.",
        why="of the images it has to take one tensor, its first argument, and to put out one.",
        fix="leave `reconstruct` out of --refine.",
    )
