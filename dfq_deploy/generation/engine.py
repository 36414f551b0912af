"""The one image-optimisation loop that every recipe uses.

Noise goes in and images come out: in each step they, or what the recipe's augmentation makes of them, are shifted and
flipped, pass the frozen model, and move against the gradient of the recipe's weighted terms. A recipe brings the terms,
the layers whose inputs they look at and the schedule; the loop knows none of their names. All that is random is drawn
before the first step, and values come to the host every `LOOK_EVERY` steps only, so that a GPU is not waited for in
between.

A run that was killed goes on from the last `Checkpoint`. One seed gives the same bytes on one CPU with one number of
threads. On a GPU, fused attention may add up its gradient in another order on each run.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dfq_deploy.generation import Progress
from dfq_deploy.generation.checkpoint import Checkpoint, give_adam
from dfq_deploy.generation.moves import Moves
from dfq_deploy.generation.patch_dropout import PatchDropout
from dfq_deploy.generation.taps import captured
from dfq_deploy.generation.trace import Trace
from dfq_deploy.generation.written_out import attention_written_out
from dfq_deploy.models import Model

__all__ = ["LOOK_EVERY", "Batch", "Learner", "Optimised", "Schedule", "Stage", "Term", "View", "fast_dtype", "optimise"]

LOOK_EVERY = 10
"""Steps between two looks at the loss: for progress, NaN, the plateau, and the file that a killed run goes on from."""

_OF = "learner."  # how the names of a learner's tensors begin in a checkpoint
_BETAS = (0.5, 0.9)  # Adam's, as in PSAQ-ViT


@dataclass(frozen=True)
class Batch:
    """Images that are made together.

    Attributes:
        size: How many.
        generator: Draws all that is random about them, on the CPU.
        progress: Told every few steps.
        unfinished: File in which a run that takes long keeps its state, and finds it again. None: it is not kept.
        first: Number of the first of them among all that the seed gives.
    """

    size: int
    generator: torch.Generator
    progress: Progress
    unfinished: Path | None = None
    first: int = 0


@dataclass(frozen=True)
class View:
    """What a term sees of one step; all tensors carry gradients.

    Attributes:
        step: Number of the step within the schedule, from 0.
        pixels: The images (B, C, H, W) as the model takes them, augmented, shifted and flipped, float32.
        outputs: The model's outputs side by side (see `Model.rows`), (B, numbers) float32; a classifier's logits.
        inputs: The inputs of the recipe's layers by name, in the network's precision.
    """

    step: int
    pixels: Tensor
    outputs: Tensor
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class Term:
    """One part of the loss: `weight` times the scalar that `value` makes of a view."""

    name: str
    weight: float
    value: Callable[[View], Tensor]


class Learner(Protocol):
    """What learns from the images while they are made, and goes on from batch to batch."""

    @property
    def facts(self) -> Sequence[object]:
        """What it learns for, JSON-serialisable."""

    def learn(self, view: View) -> None:
        """Learn from what was seen in a step, detached; without the layers' inputs."""

    def state(self) -> Mapping[str, Tensor]:
        """All that it has come to."""

    def take_up(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""


@dataclass(frozen=True)
class Stage:
    """A run of steps in which images are shifted by up to `jitter` pixels, around the edges."""

    steps: int
    jitter: int


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        stages: One after the other; each warms up and cools down on its own, Adam's state goes on.
        learning_rate: Adam's, at the end of the warm-up.
        warmup: Share of a stage in which the rate rises linearly; after it, it falls to 0 along a cosine.
        plateau: A stage ends early when the loss fell, from one window of steps to the next, by no more than this
            share of its whole fall so far. None: no stage ends early.
    """

    stages: tuple[Stage, ...]
    learning_rate: float
    warmup: float
    plateau: float | None

    @property
    def steps(self) -> int:
        """Steps in all, if no stage ends early."""
        return sum(stage.steps for stage in self.stages)

    def rate(self, stage: Stage, step: int) -> float:
        """Learning rate of step number `step` of `stage`, from 0."""
        warm = round(stage.steps * self.warmup)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / (stage.steps - warm)))


@dataclass(frozen=True)
class Optimised:
    """Images and how they came about.

    Attributes:
        pixels: The images (B, C, H, W), float32, on the host.
        precision: What the network computed in, `bfloat16` or `float32`.
        steps: How many steps it took.
        first: Each term in the first step, without its weight.
        last: Each term in the last step.
        forward: Images that went forward through a whole network, counted once per pass.
        backward: Images whose gradient came back through one.
    """

    pixels: np.ndarray
    precision: str
    steps: int
    first: Mapping[str, float]
    last: Mapping[str, float]
    forward: int
    backward: int


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where `device` multiplies in it faster than in float32, else None."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device.type == "cpu" and fast else None


def optimise(
    model: Model,
    start: Tensor,
    batch: Batch,
    *,
    layers: Mapping[str, nn.Module],
    terms: Sequence[Term],
    schedule: Schedule,
    dtype: torch.dtype | None,
    augment: Callable[[Tensor], Tensor] = lambda images: images,
    dropout: PatchDropout | None = None,
    learner: Learner | None = None,
) -> Optimised:
    """Images that lower the weighted sum of `terms`, from those in `start`.

    Args:
        model: The network that the images are shown to; its weights stay as they are.
        start: Images (B, C, H, W) float32 to begin with, in normalised units.
        batch: What draws shifts and flips, who is told, and where the state is kept.
        layers: Layers of the model whose inputs the terms look at, by any name.
        terms: What is minimised.
        schedule: How long and how fast.
        dtype: What the network computes in (autocast), or None for float32; terms, images and Adam are float32.
        augment: Makes of the images (B, C, H, W) what is shown to the model, (B', C, H, W), such as the images and
            parts of them; differentiable.
        dropout: Which patches the network is given in each step. None: all.
        learner: Who learns from each step.

    Raises:
        ImagesError: A term became NaN or Inf; the message names it and the step.
    """
    loop = _Loop(model, start, terms, schedule, dtype, batch.generator, augment, dropout)
    checkpoint = Checkpoint(batch.unfinished)
    kept = checkpoint.load()
    at_stage, at_step = loop.take_up(kept)
    if learner and kept:
        learner.take_up({name.removeprefix(_OF): part for name, part in kept.items() if name.startswith(_OF)})
    begin = 0
    with attention_written_out(loop.device), captured(layers) as inputs:
        for number, stage in enumerate(schedule.stages):
            behind = at_step if number == at_stage else stage.steps if number < at_stage else 0
            for done in range(behind + 1, stage.steps + 1):
                seen = loop.step(begin + done - 1, schedule.rate(stage, done - 1), inputs)
                if learner:
                    learner.learn(seen)
                if done % LOOK_EVERY == 0 or done == stage.steps:
                    batch.progress(begin + done, schedule.steps, loop.trace.look())
                    cooling = done - round(stage.steps * schedule.warmup)
                    if schedule.plateau is not None and loop.trace.flat(cooling, schedule.plateau):
                        break
                    checkpoint.keep(functools.partial(_state, loop, number, done, learner))
            begin += stage.steps
    trace = loop.trace
    if trace.steps < schedule.steps:
        batch.progress(schedule.steps, schedule.steps, trace.terms(-1))
    precision = str(dtype or torch.float32).removeprefix("torch.")
    return Optimised(
        pixels=loop.pixels.cpu().numpy(),
        precision=precision,
        steps=trace.steps,
        first=trace.terms(0),
        last=trace.terms(-1),
        forward=loop.shown,
        backward=loop.shown,
    )


def _state(loop: "_Loop", stage: int, done: int, learner: Learner | None) -> dict[str, Tensor]:
    """What the loop goes on from, and the learner."""
    learned = learner.state() if learner else {}
    return loop.state(stage, done) | {f"{_OF}{name}": part for name, part in learned.items()}


class _Loop:
    """What goes on from step to step: the images, Adam's state, the trace of the terms, and how many were shown."""

    def __init__(
        self,
        model: Model,
        start: Tensor,
        terms: Sequence[Term],
        schedule: Schedule,
        dtype: torch.dtype | None,
        generator: torch.Generator,
        augment: Callable[[Tensor], Tensor],
        dropout: PatchDropout | None,
    ) -> None:
        self._model, self._terms, self._dtype = model, terms, dtype
        self._augment, self._dropout = augment, dropout
        self.device = next(model.module.parameters()).device
        self.pixels = start.to(self.device, torch.float32, copy=True)
        self._low, self._high = (torch.from_numpy(bound).to(self.device) for bound in model.preprocess.bounds)
        moves = [(stage.steps, stage.jitter) for stage in schedule.stages]
        self._moves = Moves.drawn(moves, model.preprocess.size, generator, self.device)
        self._weights = torch.tensor([term.weight for term in terms], device=self.device)
        self._adam = torch.optim.Adam([self.pixels], betas=_BETAS)
        self.trace = Trace([term.name for term in terms], self._weights, schedule.steps)
        self.shown = 0

    def step(self, step: int, rate: float, inputs: Mapping[str, Tensor]) -> View:
        """Show the images to the model, move them by Adam at learning rate `rate`; returns what was seen, detached."""
        images = self.pixels.detach().requires_grad_()
        samples = self._augment(images)
        shown = self._moves.moved(samples.detach(), step).requires_grad_()
        autocast = torch.autocast(self.device.type, self._dtype or torch.bfloat16, enabled=self._dtype is not None)
        with autocast, self._dropout.during(step) if self._dropout else contextlib.nullcontext():
            outputs = self._model.rows(shown)
        view = View(step, shown, outputs.float(), inputs)
        values = torch.stack([term.value(view) for term in self._terms])
        (gradient,) = torch.autograd.grad(values @ self._weights, shown)
        (self.pixels.grad,) = torch.autograd.grad(samples, images, self._moves.moved_back(gradient, step))
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        torch.clamp(self.pixels, self._low, self._high, out=self.pixels)
        self.trace.keep(values.detach())
        self.shown += len(shown)
        return View(step, shown.detach(), outputs.detach().float(), {})

    def state(self, stage: int, done: int) -> dict[str, Tensor]:
        """All that the next steps depend on, after `done` steps of stage number `stage`."""
        adam = {f"adam.{name}": value for name, value in self._adam.state[self.pixels].items()}
        counts = torch.tensor([stage, done, self.shown])
        return {"pixels": self.pixels, "trace": self.trace.rows, "counts": counts, **adam}

    def take_up(self, state: Mapping[str, Tensor]) -> tuple[int, int]:
        """Go on from `state`, if it is not empty; returns the stage that it was in, and its steps done."""
        if not state:
            return 0, 0
        self.pixels.copy_(state["pixels"])
        self.trace.rows = state["trace"]
        adam = {name.removeprefix("adam."): value for name, value in state.items() if name.startswith("adam.")}
        give_adam(self._adam, self.pixels, adam)
        stage, done, self.shown = state["counts"].tolist()
        return stage, done
