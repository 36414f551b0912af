"""The model walked by refine passes: transforms at every fold, then corrections layer by layer.

Both change the module in place. Transforms need what passes the folds, for which the images run once. Corrections need
each layer's inputs in the float model and in the model whose earlier Linear layers are corrected and quantized, the
operands of attention matmuls with them (convolutions stay float): the two run side by side as halves of one batch, once
for all layers. Before that, a backward pass tells which tokens matter.
"""

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibrators.errors import CalibrationWarning, PlanError
from calibrators.folds import UNCHANGED, Fold, find_folds, give, layers_of, moved, outputs_of, put_back, weights_at
from calibrators.images import ImageSet
from calibrators.importance import token_importance, token_weights
from calibrators.plan import QParams
from calibrators.refine import Layer, Seen
from calibrators.registry import pick
from calibrators.scheme import QuantScheme
from calibrators.sites import Mode, SitedLinear, fitting_block, rounded, set_mode, sites_of

__all__ = ["correct", "kind_of", "transform"]

Kind = Literal["rotate", "transform", "correct", "reconstruct"]

_ROWS = 4096  # tokens kept per fold, or as many as make this many bytes at all folds together, if these are fewer
_ROWS_BYTES = 2**30
_IMAGES = 64  # that corrections look at; their memory grows with the number


def kind_of(name: str) -> Kind:
    """What the pass `name` does, which is also the name of its function.

    Raises:
        RecipeError: There is no such pass.
    """
    plugin = pick("calibrators.refine", name)
    kinds: tuple[Kind, ...] = get_args(Kind)
    return next(kind for kind in kinds if hasattr(plugin, kind))


def transform(
    module: nn.Module, images: ImageSet, names: Sequence[str], scheme: QuantScheme, blocks: Sequence[int]
) -> list[str]:
    """Apply the transforms `names` at every fold of `module`, in place.

    Args:
        module: The model.
        images: What passes it.
        names: The transforms.
        scheme: The number formats to serve.
        blocks: Sizes of the blocks that a weight's scales may have; none where a scale is for a whole row.

    Returns:
        The folds, by the names of their first readers.

    Raises:
        PlanError: The float model would no longer compute the same; it is left as it was.
    """
    assert scheme.weight is not None
    probe = torch.from_numpy(images.pixels[:2])
    folds = find_folds(module, probe)
    if not folds:
        return []
    kept = weights_at(folds)
    before = outputs_of(module, probe)
    for fold, sample in zip(folds, _sampled(module, images, folds), strict=True):
        for name in names:
            _apply(fold, sample, pick("calibrators.refine", name), scheme, blocks)
        sample.rows.clear()
    how_far = moved(before, outputs_of(module, probe))
    if not how_far < UNCHANGED:  # NaN is no less
        put_back(kept)
        raise PlanError(
            what=f"the passes {', '.join(names)} would change what the float model computes.",
            why=f"its outputs move by {how_far:.1e} of the largest, and {UNCHANGED:.0e} is rounding.",
            fix="leave them out of --refine, and report this model.",
        )
    return [fold.name for fold in folds]


def correct(
    module: nn.Module, plan: Mapping[str, QParams], images: ImageSet, names: Sequence[str]
) -> dict[str, QParams]:
    """Apply the corrections `names` to every planned Linear of `module`, in place and in the model's order.

    Returns:
        The plan's sites, with the weights' scales as the corrections left them.
    """
    passes = [pick("calibrators.refine", name) for name in names]
    pixels = torch.from_numpy(images.spread(_IMAGES).pixels[:])
    layers, apart = layers_of(module), _by_images(module, pixels.shape[1:])
    mixed = [name for name in layers if f"{name}.weight" in plan and name not in apart]
    if mixed:
        warnings.warn(
            f"{' and '.join(names)} left `{mixed[0]}` and {len(mixed) - 1} more layers as they are: what they read "
            "does not have one part for each image.",
            CalibrationWarning,
            stacklevel=2,
        )
    importance = token_importance(module, pixels)
    halves = [
        _Halves(name, layers[name], plan, passes=passes, importance=importance.get(name), images=len(pixels))
        for name in layers
        if name in apart
    ]
    _round_operands(module, plan)
    try:
        with torch.no_grad():
            module(torch.cat([pixels, pixels]))
    finally:
        for half in halves:
            half.close()
        set_mode(module, Mode.OFF)
    return {**plan, **{site: qparams for half in halves for site, qparams in half.settled.items()}}


def _by_images(module: nn.Module, shape: Sequence[int]) -> set[str]:
    """The layers that read image after image: where two images trade places, so do the halves of what comes in.

    Others have tokens first, or read the same for every image.
    """
    pair = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    sums: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for order, read in zip((pair, pair.flip(0)), sums, strict=True):

        def note(name: str, inputs: tuple[Tensor, ...], read: dict[str, Tensor] = read) -> None:
            if len(inputs[0]) % 2 == 0:
                halves = inputs[0].double().reshape(2, -1)
                read[name] = halves @ torch.arange(halves.shape[1], dtype=torch.float64).sin()

        hooks = [
            layer.register_forward_pre_hook(lambda _layer, inputs, name=name, note=note: note(name, inputs))
            for name, layer in layers_of(module).items()
        ]
        try:
            with torch.no_grad():  # what a model caches here may be needed for gradients
                module(order)
        finally:
            for hook in hooks:
                hook.remove()
    return {name for name, one in sums[0].items() if _traded(one, sums[1][name])}


def _traded(one: Tensor, other: Tensor) -> bool:
    return bool((one.flip(0) - other).abs().sum() < (one - other).abs().sum())


def _round_operands(module: nn.Module, plan: Mapping[str, QParams]) -> None:
    """Let the planned operands of attention matmuls be rounded in the second half of the batch."""
    for name, site in sites_of(module).items():
        if site.role == "operand" and name in plan:
            site.mode = Mode.FAKE
            site.round_with(functools.partial(_second_half_rounded, plan[name]))


def _second_half_rounded(qparams: QParams, values: Tensor) -> Tensor:
    floats, quantized = values.chunk(2)
    return torch.cat([floats, rounded(quantized, qparams)])


class _Halves:
    """A layer that sees a batch whose first half went through the float model, and its second through the quantized.

    When it is called for the first time it is corrected; then either half is computed as its model does.
    """

    def __init__(
        self,
        name: str,
        layer: SitedLinear,
        plan: Mapping[str, QParams],
        *,
        passes: Sequence[Any],
        importance: Tensor | None,
        images: int,
    ) -> None:
        self.settled = {site: plan[site] for site in (f"{name}.weight", f"{name}.input") if site in plan}
        self._name = name
        self._layer = layer
        self._passes = passes
        self._importance = importance
        self._images = images
        self._float = layer.weight, layer.bias
        self._corrected = False
        layer.forward = self._forward  # type: ignore[method-assign]

    def close(self) -> None:
        """The layer computes as its class does again."""
        del self._layer.forward

    def _forward(self, x: Tensor) -> Tensor:
        if not self.settled:
            return F.linear(x, self._layer.weight, self._layer.bias)
        floats, quantized = x.chunk(2)
        wanted = F.linear(floats, *self._float)
        if not self._corrected:
            self._correct(quantized, wanted)
        weight = rounded(self._layer.weight, self.settled[f"{self._name}.weight"])
        if qparams := self.settled.get(f"{self._name}.input"):
            quantized = rounded(quantized, qparams)
        return torch.cat([wanted, F.linear(quantized, weight, self._layer.bias)])

    def _correct(self, arriving: Tensor, wanted: Tensor) -> None:
        wanted = wanted.flatten(0, -2)
        layer = Layer(
            weight=self._float[0],
            bias=self._float[1],
            qparams=self.settled[f"{self._name}.weight"],
            input_qparams=self.settled.get(f"{self._name}.input"),
            name=self._name,
            arriving=arriving.flatten(0, -2),
            wanted=wanted,
            importance=token_weights(self._importance, wanted),
            images=self._images,
        )
        for one in self._passes:
            one.correct(layer)
        self.settled[f"{self._name}.weight"] = layer.qparams
        if layer.input_qparams is not None:
            self.settled[f"{self._name}.input"] = layer.input_qparams
        give(self._layer, weight=layer.weight)
        if layer.bias is not None:
            give(self._layer, bias=layer.bias)
        self._corrected = True


@dataclass
class _Sample:
    """What has passed one fold so far: every n-th token that is read, and the extremes of all that the producer made.

    For V these are wider than what is read, which averages it: other images may attend to single tokens.
    """

    rows: list[Tensor]
    low: Tensor
    high: Tensor


def _sampled(module: nn.Module, images: ImageSet, folds: Sequence[Fold], batch_size: int = 16) -> list[_Sample]:
    """What passes each fold on all of `images`."""
    nothing = [torch.full((fold.readers[0].in_features,), torch.inf) for fold in folds]
    found = {fold: _Sample([], no, -no) for fold, no in zip(folds, nothing, strict=True)}
    most = min(_ROWS, _ROWS_BYTES // max(1, 4 * sum(map(len, nothing))))

    def read(fold: Fold, _reader: SitedLinear, inputs: tuple[Tensor, ...]) -> None:
        tokens = inputs[0].flatten(0, -2)
        step = max(1, len(tokens) * len(images) // (len(batch) * most))
        found[fold].rows.append(tokens[::step].clone())

    def made(fold: Fold, _producer: nn.Module, _inputs: object, output: Tensor) -> None:
        sample, tokens = found[fold], output.flatten(0, -2)[:, fold.rows]
        sample.low = torch.minimum(sample.low, tokens.amin(0))
        sample.high = torch.maximum(sample.high, tokens.amax(0))

    hooks = [fold.readers[0].register_forward_pre_hook(functools.partial(read, fold)) for fold in folds]
    hooks += [fold.producer.register_forward_hook(functools.partial(made, fold)) for fold in folds]
    try:
        with torch.inference_mode():
            for batch in images.batches(batch_size):
                module(torch.from_numpy(batch))
    finally:
        for hook in hooks:
            hook.remove()
    return [found[fold] for fold in folds]


def _apply(fold: Fold, sample: _Sample, one: Any, scheme: QuantScheme, blocks: Sequence[int]) -> None:
    """Apply one transform at one fold, and to the sample of what passes it."""
    assert scheme.weight is not None
    offsets, factors = one.transform(
        Seen(
            rows=torch.cat(sample.rows),
            low=sample.low,
            high=sample.high,
            readers=torch.cat([reader.weight for reader in fold.readers]),
            activation=scheme.activation,
            weight=scheme.weight,
            block=fitting_block(fold.readers[0].in_features, blocks),
        )
    )
    fold.lower(offsets)
    fold.divide(factors)
    sample.rows = [(rows - offsets) / factors for rows in sample.rows]
    sample.low, sample.high = (sample.low - offsets) / factors, (sample.high - offsets) / factors
