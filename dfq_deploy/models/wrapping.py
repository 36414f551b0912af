"""Wrapping: any torch module becomes a `Model`, for what no name stands for.

The module is shown two images, which tells what it puts out and which layers it runs how often, and torch's exporter is
asked, so that what cannot become an engine is refused here and not after an hour. Linear and Conv2d layers get their
sites as in any model. One that runs several times in a pass stays float, since a site is one tensor; and one that the
outputs do not depend on is not in an engine.
"""

import contextlib
import copy
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from calibrators.errors import ModelError
from calibrators.preprocess import CropMode, Preprocess
from calibrators.sites import SitedConv2d, attach_sites, sites_of
from dfq_deploy.models import Model
from dfq_deploy.models.checkpoint import first_line
from dfq_deploy.models.loading import attach_families, fingerprint_of_weights
from dfq_deploy.models.naming import named_tensors
from dfq_deploy.tasks import task_named
from exporters.outputs import Output
from exporters.tracing import parameters_in_use

__all__ = ["wrap"]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")  # of a tensor that an engine puts out
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_AROUND = (torch.jit.ScriptModule, nn.DataParallel, nn.parallel.DistributedDataParallel)
_CLOSE = 1e-3  # of a pixel, which goes from 0 to 1


def wrap(
    module: nn.Module,
    example: Tensor,
    task: str = "classification",
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Model:
    """A copy of `module`, ready to be quantized; what `dfq.export` and its kin take in place of a recipe.

    A run goes on in a folder where weights, layers, outputs and preprocessing are as they were. A change of the code of
    `forward` alone is not seen: export to another folder then.

    Args:
        module: Takes images (N, C, H, W) float32 as its only argument, and returns a tensor or several, each (N, …): a
            dict, a tuple with names or without, a list, or an output of transformers. It is not changed.
        example: Images as it takes them, one or more: they fix C, H and W.
        task: What the outputs are: a file's name in `dfq_deploy/tasks`.
        mean: Per channel, subtracted from pixels that go from 0 to 1. With neither `mean` nor `std` the module takes
            such pixels as they are.
        std: Per channel, divided by after that.

    Raises:
        ModelError: It cannot be run on the example or exported, is not float32, or puts out something else than the
            task wants.
        RecipeError: There is no such task.
    """
    plugin = task_named(task)
    _check(module, example)
    preprocess = _preprocess(example, plugin.CROP_MODE, mean, std)
    module = _copy(module)
    name = type(module).__name__
    pair = example[:1].detach().cpu().expand(2, -1, -1, -1).clone()
    attach_families(module)  # first: it is what makes some layers run
    with _seen(module, pair) as seen:
        found = _put_out(module, pair, everything=plugin.TAKES_ALL)
    picked = plugin.pick_outputs({key: tuple(value.shape[1:]) for key, value in found.items()})
    outputs = tuple(Output(called, tuple(found[key].shape[1:])) for key, called in picked.items())
    written = _ADDRESS.sub("", repr(module))  # weights alone tell neither strides nor activations
    fingerprint = fingerprint_of_weights(f"{name} for {task}: {outputs}, {preprocess}, {written}", module)
    module.register_forward_hook(_PutOut(tuple(picked)))
    used = parameters_in_use(module, pair)
    attach_sites(
        module, only={layer for layer, calls in seen.calls.items() if calls == 1 and f"{layer}.weight" in used}
    )
    _check_sites(module, outputs)
    if seen.reader and isinstance(first := module.get_submodule(seen.reader), SitedConv2d):
        black, white = preprocess.bounds
        first.input_site.fixed = float(black.min()), float(white.max())
    return Model(
        name=name,
        module=module,
        preprocess=preprocess,
        fingerprint=fingerprint,
        classes=plugin.count_classes(outputs),
        class_names=None,
        classifiers=seen.last(found[key] for key in picked),
        task=task,
        outputs=outputs,
        first=next((layer for layer in (seen.reader, *seen.calls) if f"{layer}.input" in sites_of(module)), ""),
        wrapped=True,
    )


def _check(module: nn.Module, example: Tensor) -> None:
    if not isinstance(module, nn.Module) or not isinstance(example, Tensor):
        raise ModelError(
            what=f"wrap takes a module and a tensor, not {type(module).__name__} and {type(example).__name__}.",
            why="it runs the one on the other.",
            fix="pass a torch.nn.Module and images (N, C, H, W).",
        )
    unfinished = any(is_lazy(value) or value.is_meta for value in (*module.parameters(), *module.buffers()))
    if isinstance(module, _AROUND) or hasattr(module, "_orig_mod") or unfinished:  # that is torch.compile's
        raise ModelError(
            what=f"`{type(module).__name__}` cannot be wrapped as it is.",
            why="it is compiled, or spread over devices, or its weights are not there yet.",
            fix="pass the module itself (compiled._orig_mod, parallel.module), loaded, lazy layers after a first run.",
        )
    if example.ndim != 4 or not example.numel() or example.dtype != torch.float32 or not example.isfinite().all():
        raise ModelError(
            what=f"the example is {tuple(example.shape)} {str(example.dtype).removeprefix('torch.')}.",
            why="it has to be images (N, C, H, W), float32 and finite.",
            fix="pass torch.rand(1, 3, 224, 224), or images of your own.",
        )
    weights = [value for value in module.state_dict().values() if isinstance(value, Tensor)]
    others = {str(value.dtype) for value in weights if value.is_floating_point()} - {"torch.float32"}
    if others:
        raise ModelError(
            what=f"`{type(module).__name__}` has weights of {', '.join(sorted(others))}.",
            why="what is quantized, and what it is compared with, starts from float32.",
            fix="pass module.float().",
        )


def _check_sites(module: nn.Module, outputs: Sequence[Output]) -> None:
    sites = sites_of(module)
    if not sites:
        raise ModelError(
            what=f"`{type(module).__name__}` has no layer to quantize.",
            why="that takes an nn.Linear or nn.Conv2d inside of it, not a subclass, that runs once in a pass.",
            fix="wrap a module that has one (a single layer: nn.Sequential(layer)).",
        )
    if taken := {output.name for output in outputs} & {"images", *sites}:
        raise ModelError(
            what=f"no output can be called {', '.join(sorted(taken))}.",
            why="the engine's input or a layer's tensor is.",
            fix="return it under another name.",
        )


def _preprocess(
    example: Tensor, crop_mode: CropMode, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Preprocess:
    channels, height, width = example.shape[1:]
    low, high = float(example.min()), float(example.max())
    if mean is None and std is None and not -_CLOSE <= low <= high <= 1 + _CLOSE:
        raise ModelError(
            what=f"the example has values from {low:.2f} to {high:.2f}.",
            why="without a mean and a deviation the module takes pixels, which go from 0 to 1.",
            fix="pass mean=… and std=… as the module was trained with, or an example of such pixels.",
        )
    mean = (0.0,) * channels if mean is None else tuple(map(float, mean))
    std = (1.0,) * channels if std is None else tuple(map(float, std))
    if not len(mean) == len(std) == channels:
        raise ModelError(
            what=f"there are {len(mean)} means and {len(std)} deviations for {channels} channels.",
            why="each channel has one of both.",
            fix="pass as many.",
        )
    return Preprocess((height, width), 1.0, crop_mode, "bicubic", mean, std)


def _copy(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module).cpu().eval().requires_grad_(False)
    except Exception as cause:  # whatever an attribute of the user's raises
        raise ModelError(
            what=f"`{type(module).__name__}` cannot be copied.",
            why=f"{type(cause).__name__}: {first_line(cause)}",
            fix="wrap it before it has run, without hooks and open files.",
        ) from cause


class _Seen:
    """What one pass showed: how often each layer ran, and which read the images and which ran last."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.reader = ""
        self._outputs: list[tuple[str, Tensor]] = []

    def note(self, name: str, images: Tensor, inputs: tuple[Any, ...], output: Tensor) -> None:
        """A layer ran."""
        self.calls[name] += 1 if inputs else 2  # by keyword: no site sees it, as of a layer that runs twice
        if inputs and inputs[0] is images and not self.reader:
            self.reader = name
        self._outputs = [*self._outputs, (name, output)][-8:]

    def last(self, outputs: Iterator[Tensor]) -> tuple[str, ...]:
        """Those layers whose output is one of these tensors, and the one that ran last."""
        wanted = [id(output) for output in outputs]
        ends = [name for name, output in self._outputs if id(output) in wanted]
        return tuple(dict.fromkeys([*ends, *(name for name, _ in self._outputs[-1:])]))


@contextlib.contextmanager
def _seen(module: nn.Module, images: Tensor) -> Iterator[_Seen]:
    """What passes of `images` show within the block."""
    seen = _Seen()
    with contextlib.ExitStack() as hooks:
        for name, layer in module.named_modules():
            if type(layer) in (nn.Linear, nn.Conv2d):
                hook = layer.register_forward_hook(
                    lambda _layer, inputs, output, name=name: seen.note(name, images, inputs, output)
                )
                hooks.callback(hook.remove)
        yield seen


class _PutOut:
    """A forward hook: of all that a module returns, the tensors of a task, in its order."""

    def __init__(self, picked: tuple[str, ...]) -> None:
        self._picked = picked

    def __call__(self, module: nn.Module, _inputs: object, found: object) -> Tensor | tuple[Tensor, ...]:
        named = named_tensors(found, module)
        tensors = tuple(named[name] for name in self._picked)
        return tensors[0] if len(tensors) == 1 else tensors


def _put_out(module: nn.Module, pair: Tensor, *, everything: bool) -> dict[str, Tensor]:
    """What an engine could put out of what `module` returns for two images, by name.

    Raises:
        ModelError: It cannot be run on them, or returns nothing of the kind, or something else while `everything` is
            asked for, or NaN or Inf.
    """
    name = type(module).__name__
    try:
        with torch.no_grad():
            found = module(pair)
    except Exception as cause:  # whatever a module of the user's raises
        raise ModelError(
            what=f"`{name}` cannot be run on the example.",
            why=f"{type(cause).__name__}: {first_line(cause)}",
            fix="pass an example of the shape that it takes, and a module that takes nothing else.",
        ) from cause
    named = named_tensors(found, module)
    tensors = {
        key: value
        for key, value in named.items()
        if _NAME.fullmatch(key) and value.dtype == torch.float32 and value.ndim >= 2 and len(value) == len(pair)
    }
    if not tensors:
        raise ModelError(
            what=f"`{name}` puts out a {type(found).__name__} in which nothing is a float32 tensor (N, …) with a name.",
            why="that is all that an engine puts out. Boxes after suppression, another number per image, are none.",
            fix="wrap a module that returns one tensor, or several by name or in a tuple, before post-processing.",
        )
    if everything and (left := named.keys() - tensors.keys()):
        raise ModelError(
            what=f"`{name}` puts out what no engine can: {', '.join(sorted(map(str, left)))}.",
            why="outputs are float32 (N, …) under names of letters, digits, `_` and `.`, not a digit first.",
            fix="wrap a module that returns a dict of what you need, under such names.",
        )
    if not all(value.isfinite().all() for value in tensors.values()):
        raise ModelError(
            what=f"`{name}` puts out NaN or Inf for the example.",
            why="with that nothing can be compared.",
            fix="pass an example of real pixels, or mend the module.",
        )
    return tensors
