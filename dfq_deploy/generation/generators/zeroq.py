"""ZeroQ: images whose statistics are those that a convolutional network's BatchNorm layers remember.

For CNNs only. A BatchNorm stores the mean and the deviation that its inputs had in training; LayerNorm stores nothing,
so that a vision transformer offers no target and is refused.

Source: Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR 2020, arXiv 2001.00281: per BatchNorm the
squared distances of each image's channel means and deviations, and the same of the image itself to 0 and 1, with Adam
at 0.5 in 500 steps from noise. Differs: batches of 32 instead of 64, pixels are clamped to what real ones can be, the
images are flipped at random, Adam's betas are PSAQ-ViT's, and the rate falls along a cosine instead of on plateaus,
which would have to be waited for. `exact` keeps 500 steps and float32; else the network is computed in bfloat16 where
that is fast, and the steps end on a plateau.
"""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from calibrators.errors import ImagesError
from calibrators.images import ImageSet
from dfq_deploy.generation import GenerateOptions, Progress, quiet
from dfq_deploy.generation.batching import optimised_set
from dfq_deploy.generation.engine import Batch, Optimised, Schedule, Stage, Term, View, fast_dtype, optimise
from dfq_deploy.generation.losses import statistics_distance
from dfq_deploy.models import Model

__all__ = ["generate"]

_STAGES = (Stage(500, 0),)
_LEARNING_RATE = 0.5
_PLATEAU = 0.001
_LEAST_VARIANCE = 1e-6


def generate(model: Model, options: GenerateOptions, *, progress: Progress = quiet) -> ImageSet:
    """`options.count` ZeroQ images for `model`, see `Generator`.

    Raises:
        ImagesError: The model has no BatchNorm, or a term of the loss became NaN or Inf.
    """
    norms = {
        name: module
        for name, module in model.module.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
    }
    if not norms:
        raise ImagesError(
            what=f"`{model.name}` has no BatchNorm layers, and zeroq matches what they remember.",
            why="LayerNorm, as in vision transformers, computes its statistics anew for each image and stores none.",
            fix="use the generator `dfq` for a vision transformer, or `dead_leaves` for any model.",
        )
    one_batch = functools.partial(_one_batch, model, norms, exact=options.exact)
    return optimised_set("zeroq", model, options, one_batch, progress)


def _one_batch(
    model: Model,
    norms: Mapping[str, nn.Module],
    batch: Batch,
    *,
    exact: bool,
) -> Optimised:
    """One batch of images."""
    device = next(model.module.parameters()).device
    zero, one = torch.tensor(0.0, device=device), torch.tensor(1.0, device=device)
    return optimise(
        model,
        torch.randn((batch.size, *model.preprocess.shape), generator=batch.generator),
        batch,
        layers=norms,
        terms=(
            Term("batch_norm", 1.0, functools.partial(_distance, norms)),
            Term("pixels", 1.0, lambda view: statistics_distance(view.pixels, zero, one)),
        ),
        schedule=Schedule(_STAGES, _LEARNING_RATE, 0.0, None if exact else _PLATEAU),
        dtype=None if exact else fast_dtype(device),
    )


def _distance(norms: Mapping[str, nn.Module], view: View) -> Tensor:
    """From the inputs of every BatchNorm that was reached to its running statistics."""
    distances = []
    for name, features in view.inputs.items():
        mean, variance = norms[name].running_mean, norms[name].running_var
        assert isinstance(mean, Tensor) and isinstance(variance, Tensor)
        distances.append(statistics_distance(features.float(), mean, (variance + _LEAST_VARIANCE).sqrt()))
    return torch.stack(distances).sum()
