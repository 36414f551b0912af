"""Refine passes: one file per way to change float weights so that the model quantizes better.

A *rotation* mixes channels; a *transform* moves range out of an activation and into the weights that read it, at a
fold: after either the float model computes the same. A *correction* changes one layer's weight and bias to what serves
best once its inputs and its weight are rounded. What comes out of all are ordinary weights and biases: the exported
graph has no operator more. A pass knows one place at a time; `calibrators.rotating` and `calibrators.refining` walk the
model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor, nn

from calibrators.affine import Codes, choose_qparams
from calibrators.plan import QParams, shortened
from calibrators.sites import rounded

__all__ = ["HEADROOM", "Block", "Correction", "Layer", "Reconstruction", "Rotation", "Seen", "Transform"]

HEADROOM = 1.1
"""Range of a two-sided activation over what the calibration images show: other images reach further."""


@dataclass(frozen=True)
class Seen:
    """An activation at a fold, as the calibration images show it.

    Attributes:
        rows: A sample of tokens, (tokens, channels) float32.
        low: Smallest value of each channel over all images, (channels,); of V itself where attention's averages of it
            are read, since on other images they may come to that.
        high: Largest value, likewise, (channels,).
        readers: Weights of the layers that read it, one above the other, (outputs, channels).
        activation: Its number format, or None if it stays in float.
        weight: The number format of the readers' weights.
        block: Input channels that share a weight scale; None for a whole row.
    """

    rows: Tensor
    low: Tensor
    high: Tensor
    readers: Tensor
    activation: Codes | None
    weight: Codes
    block: int | None


@dataclass
class Layer:
    """A layer in the middle of a model whose earlier layers are quantized; a correction changes its first four fields.

    Attributes:
        weight: (outputs, inputs) float32, to be rounded by `qparams`.
        bias: (outputs,) float32, or None.
        qparams: How the weight is quantized.
        input_qparams: How its input is quantized; None if that stays float.
        name: The layer's name.
        arriving: Its inputs as the quantized model has them, not rounded yet, (tokens, inputs) float32.
        wanted: The outputs that the float model gives for the same tokens, (tokens, outputs) float32.
        importance: What a squared error in each token's output counts, (tokens,) float32; see `token_weights`.
        images: How many images the tokens come from.
    """

    weight: Tensor
    bias: Tensor | None
    qparams: QParams
    input_qparams: QParams | None
    name: str
    arriving: Tensor
    wanted: Tensor
    importance: Tensor
    images: int

    @property
    def inputs(self) -> Tensor:
        """What the layer computes with: what arrives, rounded, (tokens, inputs) float32."""
        return self.arriving if self.input_qparams is None else rounded(self.arriving, self.input_qparams)

    @property
    def weighed(self) -> Tensor:
        """Inputs, made larger or smaller so that a squared error counts as much as its token: (tokens, inputs)."""
        found: Tensor = self.inputs * self.importance.sqrt()[:, None]
        return found

    @property
    def groups(self) -> Tensor:
        """The weight as rows that share a scale, (outputs * blocks, inputs per block)."""
        return self.weight.reshape(-1, self.qparams.block or self.weight.shape[1])

    def rounded(self) -> Tensor:
        """The weight as it comes back from its codes."""
        return rounded(self.weight, self.qparams)

    def cover(self, share: Tensor | float = 1.0) -> None:
        """Give the weight the scales that hold `share` of the range of each row of `groups`, (rows,) or one for all."""
        low, high = ((end * share).numpy() for end in (self.groups.amin(1), self.groups.amax(1)))
        scale, zero = choose_qparams(low, high, self.qparams.codes)
        scale = scale if self.qparams.block is None else shortened(scale)
        shape = self.qparams.scale.shape
        self.qparams = replace(self.qparams, scale=scale.reshape(shape), zero_point=zero.reshape(shape))


@dataclass
class Block:
    """A block in the middle of a model whose earlier blocks are quantized; a reconstruction changes it and its sites.

    Attributes:
        module: The block.
        name: Its name.
        compute: Runs it, (N, …) to (N, …).
        arriving: Its inputs as the quantized model has them, one entry per image, (N, …) float32.
        wanted: What it puts out in the float model for the same images, (N, …) float32.
        sites: Number formats of the sites in it.
        losses: Of each step.
    """

    module: nn.Module
    name: str
    compute: Callable[[Tensor], Tensor]
    arriving: Tensor
    wanted: Tensor
    sites: dict[str, QParams]
    losses: list[float] = field(default_factory=list)


class Rotation(Protocol):
    """What a file with a rotation offers."""

    def rotate(self, width: int) -> Tensor:
        """An orthogonal matrix, (width, width) float64, that maps (1, …, 1) to itself."""
        ...


class Transform(Protocol):
    """What a file with a transform offers."""

    def transform(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Offsets to take off the activation, and factors to divide it by, each (channels,) float32."""
        ...


class Correction(Protocol):
    """What a file with a correction offers."""

    def correct(self, layer: Layer) -> None:
        """Change the layer's weight, bias and qparams, or its input's."""
        ...


class Reconstruction(Protocol):
    """What a file with a reconstruction offers."""

    def reconstruct(self, block: Block) -> None:
        """Learn the block's parameters and the scales of its sites."""
        ...
