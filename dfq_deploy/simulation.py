"""What a plan is worth, computed in PyTorch: the reference against the float model, with no engine in between.

For number formats that no run-time has kernels for. It says how accurate they are, not how fast anything would be.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from calibrators.images import ImageSet
from dfq_deploy.evaluate import Share, mean_with_interval, sqnr_of, without_nan
from dfq_deploy.reference import Reference

__all__ = ["Simulation", "compare"]


@dataclass(frozen=True)
class Simulation:
    """What was found of a plan.

    Attributes:
        scheme: Name of the plan's scheme.
        n: Number of images.
        images: Where they come from.
        top1: Label accuracy of `float` and `simulated`; None without labels.
        drop: Points that are lost against float, paired per image, (value, low, high); None without labels.
        agreement: Top-1 agreement with float.
        sqnr_db: Signal to quantization noise of the logits.
        student: What is simulated has the weights of a student that came with the images; float has the model's own.
    """

    scheme: str
    n: int
    images: str
    top1: Mapping[str, Share] | None
    drop: tuple[float, float, float] | None
    agreement: Share
    sqnr_db: float
    student: bool = False

    def report(self) -> dict[str, Any]:
        """The findings as JSON."""
        found: dict[str, Any] = {"simulated": True, **without_nan(asdict(self))}
        return found


def compare(
    reference: Reference,
    images: ImageSet,
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> Simulation:
    """Compare a reference with the float model.

    Args:
        reference: The torch model under a plan.
        images: What to compare on, real or synthetic, labelled or not.
        batch_size: Images per forward pass.
        progress: Called with images done and in all.
    """
    parts: dict[str, list[np.ndarray]] = {"float": [], "simulated": []}
    for batch in images.batches(batch_size):
        parts["float"].append(reference.float(batch))
        parts["simulated"].append(reference.quantized(batch))
        progress(sum(map(len, parts["float"])), len(images))
    logits = {name: np.concatenate(part).astype(np.float64) for name, part in parts.items()}
    best = {name: values.argmax(1) for name, values in logits.items()}
    top1 = drop = None
    if images.labels is not None:
        hits = {name: classes == images.labels for name, classes in best.items()}
        top1 = {name: Share.of(hit) for name, hit in hits.items()}
        drop = mean_with_interval(100.0 * (hits["float"].astype(float) - hits["simulated"]))
    return Simulation(
        scheme=reference.plan.scheme,
        n=len(images),
        images=images.source,
        top1=top1,
        drop=drop,
        agreement=Share.of(best["simulated"] == best["float"]),
        sqnr_db=sqnr_of(logits["float"], logits["simulated"]),
    )
