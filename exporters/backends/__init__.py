"""Backends: one file per run-time, each with the same six verbs. No torch.

A backend says what it wants quantized and what it cannot run before it tries, changes the graph where the run-time
needs it, turns an ONNX file with Q/DQ into what it loads, and runs it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from calibrators.plan import QuantPlan
from exporters.census import Body, Census

if TYPE_CHECKING:  # onnx-ir brings sympy: a third of a second, which `--help` would pay
    import onnx_ir as ir

__all__ = ["Backend", "BuildOptions", "Built", "Engine", "Placement"]


@dataclass(frozen=True)
class Placement:
    """What a run-time wants quantized when nobody says otherwise.

    Attributes:
        first_layer: The layer that reads the image.
        convolution_outputs: The outputs of convolutions, without which it would not fuse them.
        noisy_layers: Layers whose rounding makes most of the noise in the logits; else they stay float, or get INT8
            weights where the scheme wants INT4.
        blocks: Sizes that the blocks of a weight's input channels may have. Placements that differ in these alone are
            equal: `check` refuses a plan whose blocks are not taken.
        zero_points: INT4 weights with a zero-point per block.
    """

    first_layer: bool
    convolution_outputs: bool
    noisy_layers: bool
    blocks: tuple[int, ...] = field(compare=False)
    zero_points: bool


@dataclass(frozen=True)
class BuildOptions:
    """What an engine is built for.

    Attributes:
        body: What everything that is not quantized is computed in.
        provider: Which of the run-time's providers runs it; empty where there is but one.
        targets: GPUs to build for, as `sm89`; empty for the one at hand.
        batch: Smallest, usual and largest number of images per call.
        level: The builder's optimisation level; None for its own.
        workspace: Scratch memory that a kernel may use, in bytes; None for the builder's own limit.
    """

    body: Body = "fp32"
    provider: str = ""
    targets: tuple[str, ...] = ()
    batch: tuple[int, int, int] = (1, 8, 32)
    level: int | None = None
    workspace: int | None = None


@dataclass(frozen=True)
class Built:
    """What a build gave.

    Attributes:
        state: `built`, or `pending`: it has to be built on another machine.
        census: What each layer is computed in; of `pending`, as far as it can be known here.
        files: Names of the files that were written beside the model.
        made_for: What the engine depends on: versions, GPU. An engine runs only where they are the same.
        note: For people: why it is pending, or who says what the census says.
    """

    state: Literal["built", "pending"]
    census: Census
    files: tuple[str, ...] = ()
    made_for: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


class Engine(Protocol):
    """A loaded model, which several threads may call at once."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The model's outputs side by side (see `exporters.outputs`), (N, numbers) float32, of images (N, C, H, W)."""
        ...

    def close(self) -> None:
        """Free what the engine holds; it cannot be called afterwards."""
        ...


class Backend(Protocol):
    """What each module in this folder offers."""

    def placement(self, options: BuildOptions) -> Placement:
        """What is quantized by default."""
        ...

    def check(self, plan: QuantPlan, options: BuildOptions) -> None:
        """Return if this backend can run the plan; raise BackendError with the reason if not."""
        ...

    def prepare(self, model: "ir.Model", plan: QuantPlan, options: BuildOptions) -> None:
        """Change the quantized model, in place, where the run-time would misread it; no value changes."""
        ...

    def build(self, model: Path, plan: QuantPlan, options: BuildOptions) -> Built:
        """Make the file `model` runnable, beside it, and say what each layer is computed in."""
        ...

    def load(
        self, model: Path, made_for: Mapping[str, str], options: BuildOptions, *, threads: int | None = None
    ) -> Engine:
        """The engine of the file `model`, which was built with `options` and is `made_for` something.

        It computes a call with so many `threads` of the CPU, or as many as it wants; BackendError if it has no choice.
        """
        ...

    def time_layers(
        self, models: Sequence[Path], layers: Iterable[str], options: BuildOptions
    ) -> list[dict[str, float]]:
        """Milliseconds per layer in a call with one image, "" for the rest, by model; BackendError if it cannot."""
        ...
