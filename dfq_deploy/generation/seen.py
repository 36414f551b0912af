"""What a model sees in images: how alike their patches are to it, and what its heads attend to.

For pictures of sets that are finished; what is optimised while they are made is the recipes' business. Attention of a
set whose generator asked for some comes with the priors that it asked for, drawn again from the set's own facts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from calibrators.errors import ImagesError
from calibrators.images import ImageSet
from calibrators.registry import pick
from dfq_deploy.generation.attention import rows_of, taps_with_rows
from dfq_deploy.generation.generators import ATTENTIVE
from dfq_deploy.generation.losses import patch_similarities
from dfq_deploy.generation.making import parts_of
from dfq_deploy.generation.priors import patch_grid
from dfq_deploy.generation.taps import AttentionTap, attention_taps, captured
from dfq_deploy.models import Model

__all__ = ["BINS", "AttentionMaps", "attention_maps", "similarity_histograms"]

BINS = 80  # of a histogram of cosine similarities, from -1 to 1
_BATCH = 8  # images at a time: all pairs of patches lie in memory
_PATCHES = 256  # per window, evenly spaced, of which all pairs are compared
_SHOWN = 4  # images whose attention is looked at


def similarity_histograms(model: Model, sets: Mapping[str, ImageSet]) -> dict[str, dict[str, np.ndarray]]:
    """How often patches are how alike in the first, the middle and the last attention: (BINS,) counts by layer and set.

    Cosine similarities of softmax·V, averaged over the heads, of every pair of patches within an image's window.

    Raises:
        ImagesError: The model has no attention over patches.
    """
    taps = attention_taps(model)
    looked_at = list({tap.name: tap for tap in (taps[0], taps[len(taps) // 2], taps[-1])}.values())
    counts = {tap.name: {name: np.zeros(BINS, np.int64) for name in sets} for tap in looked_at}
    device = next(model.module.parameters()).device
    with torch.inference_mode(), captured({tap.name: tap.layer for tap in looked_at}) as inputs:
        for name, images in sets.items():
            for batch in images.batches(_BATCH):
                model.module(torch.from_numpy(batch).to(device))
                for tap in looked_at:
                    patches = tap.contexts(inputs).mean(3)[:, :, :: -(-tap.tokens // _PATCHES)]
                    alike = patch_similarities(patches).clamp(-1, 1)  # rounding may leave them a little outside
                    counts[tap.name][name] += torch.histc(alike, BINS, -1, 1).long().cpu().numpy()
    return counts


@dataclass(frozen=True)
class AttentionMaps:
    """What the heads of one layer attend to in a few images.

    Attributes:
        layer: The attention's output projection, by name.
        of: `class token` or, without one, `mean query`: whose attention it is.
        images: The images (n, C, H, W), as the model takes them.
        rows: Shares of attention (n, heads, rows, columns) on the patch grid; what prefix tokens get is missing.
        priors: What was asked for, of the same shape; None where nothing was.
    """

    layer: str
    of: str
    images: np.ndarray
    rows: np.ndarray
    priors: np.ndarray | None


def attention_maps(model: Model, images: ImageSet) -> AttentionMaps:
    """The attention of the deepest layer that sees the whole image, for the first few images.

    Where some of a set come from a generator that asks for attention, it is the first few of those.

    Raises:
        ImagesError: The model shows no attention from patch to patch, or within windows only.
    """
    taps = [tap for tap in taps_with_rows(model, attention_taps(model)) if tap.windows == 1]
    if not taps:
        raise ImagesError(
            what=f"`{model.name}` shows no attention over a whole image.",
            why="all of its attention is within windows.",
            fix="look at patch similarities instead.",
        )
    tap, (start, priors) = taps[-1], _priors_of(model, images, taps[-1])
    pixels = images.pixels[start : start + _SHOWN] if priors is None else images.pixels[start : start + len(priors)]
    device = next(model.module.parameters()).device
    with torch.inference_mode(), rows_of([tap]) as rows:
        model.module(torch.from_numpy(pixels).to(device))
        found = rows.of(tap)[:, 0].cpu().numpy()
    height, width = images.preprocess.size
    grid = patch_grid(tap.tokens, height / width)
    shape = (len(pixels), tap.heads, *grid)
    of = "class token" if tap.class_token else "mean query"
    return AttentionMaps(tap.name, of, pixels, found.reshape(shape), None if priors is None else priors.reshape(shape))


def _priors_of(model: Model, images: ImageSet, tap: AttentionTap) -> tuple[int, np.ndarray | None]:
    """The first image in the set that was asked for attention at `tap`, and the priors of the first few from there on.

    (0, None) where none was, where it was of another model, or where the set is no longer the one that was made.
    """
    parts = parts_of(images)
    whole = sum(part["count"] for part in parts) == len(images)
    asked = [number for number, part in enumerate(parts) if part["generator"] in ATTENTIVE]
    if not whole or not asked or parts[asked[0]]["model_fingerprint"] != model.fingerprint:
        return 0, None
    facts, start = parts[asked[0]], sum(part["count"] for part in parts[: asked[0]])
    drawn: list[torch.Tensor] = []
    for priors in pick("dfq_deploy.generation.generators", facts["generator"]).priors_of(model, facts):
        if tap.name not in priors:
            return 0, None
        drawn.append(priors[tap.name][:, 0])
        if sum(map(len, drawn)) >= _SHOWN:
            break
    return (start, torch.cat(drawn)[:_SHOWN].numpy()) if drawn else (0, None)
