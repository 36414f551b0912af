"""Scores of a model or of its engine against the truth, where a task has one: mAP, mIoU.

Two calls, one with the float model and one with a runner of its engine, tell what quantization costs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from calibrators.errors import ImagesError, RecipeError
from calibrators.registry import names, pick
from dfq_deploy.models import Model
from dfq_deploy.reference import float_rows
from dfq_deploy.runtime import Runner
from exporters.outputs import parts_of

__all__ = ["score"]

_SCORES = "dfq_deploy.scores"


def score(
    network: Model | Runner, images: np.ndarray, truth: Sequence[Any], *, batch_size: int = 8
) -> dict[str, float]:
    """How well `network` does on `images`, in percent, by the names of the field.

    Args:
        network: A model from `wrap`, or the runner of a bundle.
        images: Model input, (N, C, H, W) float32; `Runner.preprocess` makes it.
        truth: What each image shows. Of a segmentation the classes, (H, W); of a detection a dict of `boxes` (n, 4),
            each (centre x, centre y, width, height) as shares of the image, and `labels` (n,).
        batch_size: Images per forward pass.

    Raises:
        RecipeError: The task has no score, torchmetrics is not installed, or `network` is neither of the two.
        ImagesError: There is not one truth per image, the images do not fit, or no truth has anything to find.
    """
    if not isinstance(network, Model | Runner):
        raise RecipeError(
            what=f"score takes a model from wrap or a runner, not {type(network).__name__}.",
            why="it has to know the task.",
            fix="pass dfq.wrap(module, example, task=…), or dfq.load(FOLDER).",
        )
    facts = network if isinstance(network, Model) else network.manifest.model
    if facts.task not in names(_SCORES):
        raise RecipeError(
            what=f"there is no score for {facts.task}.",
            why=f"scores are there for {', '.join(names(_SCORES))}; a check tells top-1 where images have labels.",
            fix="compare the outputs with what you know, or see the agreement that a check tells.",
        )
    if len(images) != len(truth) or not len(images):
        raise ImagesError(
            what=f"there are {len(images)} images and {len(truth)} truths.",
            why="each image has one.",
            fix="pass as many.",
        )
    if batch_size < 1:
        raise RecipeError(
            what=f"a batch of {batch_size} images is none.", why="the images pass in batches.", fix="pass 1 or more."
        )
    images = np.ascontiguousarray(images, np.float32)
    wanted = (network if isinstance(network, Model) else network.manifest).preprocess.shape
    if images.shape[1:] != wanted:
        raise ImagesError(
            what=f"images of shape {images.shape} do not fit the model.",
            why=f"it takes (N, {', '.join(map(str, wanted))}).",
            fix="make them with Runner.preprocess.",
        )
    try:
        plugin = pick(_SCORES, facts.task)
        metric = plugin.metric(facts.classes)
    except ModuleNotFoundError as cause:
        raise RecipeError(
            what=f"a score needs the package `{cause.name}`, which is not installed.",
            why="torchmetrics computes it.",
            fix="pip install 'dfq-deploy[score]'.",
        ) from cause
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        found = (
            network.outputs(batch)
            if isinstance(network, Runner)
            else parts_of(float_rows(network, batch), facts.outputs)
        )
        tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in found.items()}
        plugin.add(metric, tensors, list(truth[start : start + batch_size]))
    scores: dict[str, float] = plugin.read(metric)
    if not all(0 <= value <= 100 for value in scores.values()):  # torchmetrics says -1 or NaN then
        raise ImagesError(
            what="there is nothing to score.",
            why="the truth has no box, or no place with a class of the model.",
            fix="pass images with something to find on them.",
        )
    return scores
