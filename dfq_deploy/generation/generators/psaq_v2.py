"""PSAQ-ViT V2: images and a quantized student evolve against each other, both under the float model as their teacher.

Images are made as in V1, but with no classes. Once they have structure a student joins: the model, rounded as it will
be when it is deployed. In each step the images move to where student and teacher differ, and then the student moves its
weights to where they differ less. What is handed back is the images and these weights, which calibration, reference
and engine use in place of the model's. They serve the formats that they learned for: `GenerateOptions.formats`, the
run's (`dfq-deploy generate` takes `--scheme`, and all else by default). Without formats there is no student, and the
images end where it would have joined.

Source: Li et al., "PSAQ-ViT V2", arXiv 2209.05687. Its code was never released. It has teacher, student, the mean
absolute error between them and no class prior; the form of the loss, L_PSE + 0.05 |R_TV - v| - D, and everything on the
schedule is ours. The roughness keeps V1's target v, since images would flatten without one. D is divided by the mean
size of the teacher's outputs; of several outputs, a detector's logits and boxes, it is the mean of theirs. The
student's scales are not learned: they are read off the images anew every `_ROUND` steps, as calibration will do at the
end. It learns from a step's images in parts of `_PART`; backwards, rounding counts as the identity. Its learning rate
is proportional to how far off it is when it joins (one that suits 4 bits spoils a student in 8, which is near its
teacher already) and falls to 0 along a cosine. Where there are several batches the student goes on from one to the
next, so that a later batch cannot be made alone. The exact form has V1's estimator, more steps and float32.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calibrators.images import ImageSet
from calibrators.learned import Learned
from calibrators.sites import Mode, set_mode
from calibrators.student import Student
from dfq_deploy.generation import Formats, GenerateOptions, Progress, quiet
from dfq_deploy.generation.batching import optimised_set, settings_of
from dfq_deploy.generation.checkpoint import give_adam
from dfq_deploy.generation.device import moved_to
from dfq_deploy.generation.engine import LOOK_EVERY, Batch, Optimised, Stage, Term, View, fast_dtype, optimise
from dfq_deploy.generation.losses import discrepancy
from dfq_deploy.generation.similarity import roughness, schedule, similarity
from dfq_deploy.generation.taps import AttentionTap, attention_taps
from dfq_deploy.models import Model
from dfq_deploy.refined import changed_weights, copy_of

__all__ = ["PsaqV2", "generate"]

_EXACT_STAGES = (Stage(500, 15), Stage(500, 30))  # images alone, then images against student; shifts at 224 x 224
_FAST_STAGES = (Stage(100, 30), Stage(30, 30))
_PART = 8  # images per update of the student
_ROUND = LOOK_EVERY  # steps between two looks at the student's ranges, so that a killed run goes on with such a look


def generate(model: Model, options: GenerateOptions, *, progress: Progress = quiet) -> ImageSet:
    """`options.count` PSAQ-ViT V2 images for `model`, and a student, see `Generator`.

    Raises:
        ImagesError: The model has no attention over patches, or a term of the loss became NaN or Inf.
        PlanError: The student's ranges are unusable, or there is nothing to quantize.
    """
    return PsaqV2().generate(model, options, progress=progress)


@dataclass(frozen=True)
class PsaqV2:
    """The recipe; these weights and the rate are unconfirmed, and ours.

    Attributes:
        roughness: Weight of the total variation, as in V1.
        against: Weight of the discrepancy in the images' loss.
        learning_rate: The student's, by Adam, where it is as far off as its teacher's outputs are large.
    """

    roughness: float = 0.05
    against: float = 1.0
    learning_rate: float = 1e-4

    def generate(self, model: Model, options: GenerateOptions, *, progress: Progress = quiet) -> ImageSet:
        """As the module's `generate`, with these weights."""
        taps = attention_taps(model)
        learner = None
        if options.formats is not None:
            learner = _Learner(model, options.formats, options.exact, self.learning_rate)
        one_batch = functools.partial(self._one_batch, model, taps, learner, exact=options.exact)
        here = replace(options, elsewhere=None)  # a student has to learn from each batch, one after the other
        images = optimised_set("psaq_v2", model, here, one_batch, progress, settings_of(self), learner)
        student = learner.student() if learner else None
        if learner is None or student is None:
            return images
        learned = {"scheme": student.scheme, "discrepancy": [float(learner.losses[step]) for step in (0, -1)]}
        made_by = {**images.made_by, "student": learned}
        return ImageSet.of(images.pixels, model.preprocess, source=images.source, made_by=made_by, student=student)

    def _one_batch(
        self,
        model: Model,
        taps: Sequence[AttentionTap],
        learner: "_Learner | None",
        batch: Batch,
        *,
        exact: bool,
    ) -> Optimised:
        """One batch of images."""
        size, generator = batch.size, batch.generator
        device = next(model.module.parameters()).device
        steps = schedule(model, taps, _stages(exact) if learner else _stages(exact)[:1])
        start = torch.randn((size, *model.preprocess.shape), generator=generator)
        rough = roughness(size, model.preprocess.size, generator)
        compared = similarity(taps, exact, steps.steps, generator, device)
        terms = [Term("patch_similarity", 1.0, compared), Term("total_variation", self.roughness, rough)]
        if learner:
            terms.append(Term("discrepancy", -self.against, learner.against))
        before = learner.shown if learner else 0
        try:
            made = optimise(
                model,
                start,
                batch,
                layers={tap.name: tap.layer for tap in taps},
                terms=terms,
                schedule=steps,
                dtype=None if exact else fast_dtype(device),
                learner=learner,
            )
        except torch.OutOfMemoryError:  # all batches are made again, half as large
            if learner:
                learner.begin()
            raise
        more = learner.shown - before if learner else 0
        return replace(made, forward=made.forward + more, backward=made.backward + more)


def _stages(exact: bool) -> tuple[Stage, Stage]:
    return _EXACT_STAGES if exact else _FAST_STAGES


class _Learner:
    """The student on its way, which rounds as the plan of the moment says.

    Attributes:
        losses: Its discrepancy in each step, as it was before it learned from that step's images.
        shown: Images that went through it, forward and backward, counted once per pass; those that only its ranges
            were read from are not among them.
    """

    def __init__(self, model: Model, formats: Formats, exact: bool, learning_rate: float) -> None:
        self._teacher, self._formats, self._rate = model, formats, learning_rate
        self._dtype = None if exact else fast_dtype(next(model.module.parameters()).device)
        self._joins, self._steps = (stage.steps for stage in _stages(exact))
        self._scheme = ""
        self.begin()

    def begin(self) -> None:
        """Know nothing but what the teacher knows."""
        self._student = copy_of(self._teacher)
        self._parameters = list(self._student.module.parameters())
        self._adam = torch.optim.Adam(self._parameters, lr=self._rate)
        self.losses: list[Tensor] = []
        self.shown = 0
        self._far = 0.0

    @property
    def facts(self) -> Sequence[object]:
        """What it learns for."""
        return self._formats.facts

    def against(self, view: View) -> Tensor:
        """The discrepancy on the images of a step, which they are to raise; 0 before the student joins."""
        if view.step < self._joins:
            return view.outputs.new_zeros(())
        if (view.step - self._joins) % _ROUND == 0:
            self._calibrate(view.pixels)
        found = self._discrepancy(view.pixels, view.outputs)
        self.losses.append(found.detach())
        return found

    def learn(self, view: View) -> None:
        """Lower the discrepancy on the images of a step by moving the student's weights."""
        if view.step < self._joins:
            return
        self._far = self._far or min(float(self.losses[0]), 1.0)
        done = (view.step - self._joins) / self._steps
        self._adam.param_groups[0]["lr"] = self._rate * self._far * 0.5 * (1 + math.cos(math.pi * done))
        for pixels, wanted in zip(*(torch.split(part, _PART) for part in (view.pixels, view.outputs)), strict=True):
            loss = self._discrepancy(pixels, wanted)
            gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            self._adam.step()

    def state(self) -> dict[str, Tensor]:
        """What it has come to; what it is rounded to is read off the images anew in the step after."""
        found = {"losses": torch.stack(self.losses) if self.losses else torch.empty(0)}
        found["shown"] = torch.tensor(self.shown)
        found["scheme"] = torch.tensor(list(self._scheme.encode()), dtype=torch.uint8)
        for number, parameter in enumerate(self._parameters):
            found[f"{number}"] = parameter
            found |= {f"{number}.{name}": part for name, part in self._adam.state[parameter].items()}
        return found

    def take_up(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what an earlier run had come to."""
        self.begin()
        self.losses = list(state["losses"].to(self._parameters[0].device))
        self.shown = int(state["shown"])
        self._scheme = bytes(state["scheme"].tolist()).decode()
        for number, parameter in enumerate(self._parameters):
            parameter.data.copy_(state[f"{number}"])
            parts = {name.partition(".")[2]: part for name, part in state.items() if name.startswith(f"{number}.")}
            if parts:
                give_adam(self._adam, parameter, parts)

    def student(self) -> Student | None:
        """What it has learned; None if that is nothing."""
        set_mode(self._student.module, Mode.OFF)
        weights = changed_weights(self._teacher, self._student)
        return Student(weights, self._teacher.fingerprint, self._scheme) if weights else None

    def _discrepancy(self, pixels: Tensor, wanted: Tensor) -> Tensor:
        with torch.autocast(pixels.device.type, self._dtype or torch.bfloat16, enabled=self._dtype is not None):
            outputs = self._student.rows(pixels)
        self.shown += len(pixels)
        pairs = zip(*(self._teacher.parts(rows) for rows in (outputs.float(), wanted)), strict=True)
        return torch.stack([discrepancy(found, output) for found, output in pairs]).mean()

    def _calibrate(self, pixels: Tensor) -> None:
        """Round by the plan that these images give the student as it is."""
        images = ImageSet.of(pixels.numpy(force=True), self._teacher.preprocess, source="the images so far")
        with moved_to("cpu", self._student):  # as all calibration is computed
            plan = self._formats(self._student, images)
        self._scheme = plan.scheme
        learned = Learned(self._student.module, plan.sites)
        for part in (*learned.scales.values(), *learned.zeros.values()):
            part.requires_grad_(False)
