"""What each part of `dfq` is worth, and what parts of other recipes would add: `make ablation`.

Each further part added alone, where the model sees all patches; then each part left out alone; and what the images
calibrate, every scheme with its passes. `DFQ_DATA` names real weights and images. The further parts are not in `dfq`.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any
from unittest.mock import patch

import torch
from judged import asked, judged, model_asked_for, tabulated
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from calibrators.images import ImageSet
from dfq_deploy.generation import GenerateOptions
from dfq_deploy.generation.attention import rows_of, taps_with_rows
from dfq_deploy.generation.engine import Batch, Optimised, Term, View, optimise
from dfq_deploy.generation.generators import dfq
from dfq_deploy.generation.losses import attention_alignment
from dfq_deploy.generation.priors import attention_prior, soft_labels
from dfq_deploy.generation.taps import attention_taps
from dfq_deploy.models import Model

_BLUR = 4.0  # pixels, of the Gaussian that the frequency curriculum begins with
_SHARP = 0.5  # share of the steps after which it shows all frequencies


def attention_priors(model: Model, start: Tensor, batch: Batch, *, terms: list[Term], **others: Any) -> Optimised:
    """Attention Priors Alignment, as `spdfq` has it."""
    taps = taps_with_rows(model, attention_taps(model))
    deep = list(enumerate(taps, start=1))[len(taps) // 2 :]
    random = torch.Generator().manual_seed(0)
    priors = [(depth / len(taps), tap, attention_prior(tap, len(start), 1.0, random)) for depth, tap in deep]
    with rows_of([tap for _, tap in deep]) as rows:

        def alignment(_view: View) -> Tensor:
            return torch.stack([part * attention_alignment(rows.of(tap), prior) for part, tap, prior in priors]).sum()

        return optimise(model, start, batch, terms=[*terms, Term("attention", 1.0, alignment)], **others)


def similar_heads(model: Model, start: Tensor, batch: Batch, *, terms: list[Term], **others: Any) -> Optimised:
    """Heads of a layer that attend alike: one minus the mean cosine of their rows (MimiQ compares by SSIM)."""
    taps = taps_with_rows(model, attention_taps(model))
    with rows_of(taps) as rows:

        def unlike(_view: View) -> Tensor:
            apart = []
            for tap in taps:
                directions = F.normalize(rows.of(tap), dim=-1)  # (B, windows, heads, tokens)
                apart.append(1 - (directions.sum(2).square().sum(-1) - tap.heads).mean() / (tap.heads**2 - tap.heads))
            return torch.stack(apart).sum()

        return optimise(model, start, batch, terms=[*terms, Term("heads", 1.0, unlike)], **others)


def soft_classes(model: Model, start: Tensor, batch: Batch, *, terms: list[Term], **others: Any) -> Optimised:
    """Softlabel Learning of one class, as `spdfq` has it, in place of the class alone."""
    random = torch.Generator().manual_seed(0)
    classes = F.one_hot(torch.randint(model.classes, (len(start),), generator=random), model.classes)
    labels = soft_labels(classes > 0, random)
    soft = Term("cross_entropy", 1.0, lambda view: F.cross_entropy(view.outputs, labels))
    return optimise(model, start, batch, terms=[soft if term.name == soft.name else term for term in terms], **others)


def frequency_curriculum(model: Model, start: Tensor, batch: Batch, **others: Any) -> Optimised:
    """The model sees blurred images, less and less so, and all frequencies from the middle on."""
    steps = iter(range(others["schedule"].steps))

    def blurred(images: Tensor) -> Tensor:
        left = 1 - next(steps) / (_SHARP * others["schedule"].steps)
        return gaussian_blur(images, [25, 25], [_BLUR * left] * 2) if left > 0 else images

    return optimise(model, start, batch, augment=blurred, **others)


def main() -> None:
    """Make, simulate and tabulate."""
    args = asked(__doc__, "w6a6,w4a4")
    model, options = model_asked_for(args), GenerateOptions(args.count, args.seed)

    def plain(**parts: bool) -> ImageSet:
        return dfq.Dfq(**parts).generate(model, options)

    def with_part(part: Callable[..., Optimised]) -> ImageSet:
        with patch.object(dfq, "optimise", part):
            return plain(patch_dropout=False)

    makers: dict[str, Callable[[], ImageSet]] = {"all parts": plain}
    for part in (attention_priors, soft_classes, similar_heads, frequency_curriculum):
        makers[f"all patches, with {part.__name__}"] = lambda part=part: with_part(part)
    for field in fields(dfq.Dfq):
        if field.type is bool:
            makers[f"without {field.name}"] = lambda name=field.name: plain(**{name: False})
    rows = {}
    for name, make in makers.items():
        rows[name] = judged(args, name, make)
        print(tabulated(args, rows).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
