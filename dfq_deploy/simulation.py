"""What a plan is worth, computed in PyTorch: the reference against the float model, with no engine in between.

For number formats that no run-time has kernels for. It says how accurate they are, not how fast anything would be. The
float model's outputs are computed by themselves, so that many plans can be held against them.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from calibrators.images import ImageSet
from dfq_deploy.measures import Share, sqnr_of, without_nan
from dfq_deploy.reference import Reference
from dfq_deploy.statistics import Paired
from dfq_deploy.tasks import task_named
from exporters.outputs import parts_of

__all__ = ["Simulation", "compare", "rows_for"]


@dataclass(frozen=True)
class Simulation:
    """What was found of a plan.

    Attributes:
        scheme: Name of the plan's scheme.
        n: Number of images.
        images: Where they come from.
        top1: Label accuracy of `float` and `simulated`; None without labels.
        drop: Points that are lost against float, paired per image, (value, low, high); None without labels.
        agreement: With float, as the task has it: top-1 agreement of a classifier.
        sqnr_db: Signal to quantization noise of what is put out, a classifier's logits.
        task: What the outputs are.
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
    task: str = "classification"

    def report(self) -> dict[str, Any]:
        """The findings as JSON."""
        found: dict[str, Any] = {"simulated": True, **without_nan(asdict(self))}
        return found


def rows_for(
    network: Callable[[np.ndarray], np.ndarray],
    images: ImageSet,
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> np.ndarray:
    """What `network` makes of all images, (N, numbers) float64.

    Args:
        network: A model, a batch of images in, its outputs out: `Reference.float`, `Reference.quantized`.
        images: What it is shown.
        batch_size: Images per forward pass.
        progress: Called with images done and in all.
    """
    parts: list[np.ndarray] = []
    for batch in images.batches(batch_size):
        parts.append(network(batch))
        progress(sum(map(len, parts)), len(images))
    return np.concatenate(parts).astype(np.float64)


def compare(
    reference: Reference,
    images: ImageSet,
    floats: np.ndarray,
    *,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> Simulation:
    """Compare a reference with the float model.

    Args:
        reference: The torch model under a plan.
        images: What to compare on, real or synthetic, labelled or not.
        floats: What the float model puts out for them, see `rows_for`.
        progress: Called with images done and in all.
    """
    model = reference.model
    task = task_named(model.task)
    rows = {"float": floats, "simulated": rows_for(reference.quantized, images, progress=progress)}
    parts = {name: parts_of(values, model.outputs) for name, values in rows.items()}
    top1 = drop = None
    if images.labels is not None:
        hits = {name: np.asarray(task.decide(found) == images.labels) for name, found in parts.items()}
        top1 = {name: Share.of(hit) for name, hit in hits.items()}
        drop = Paired.of(hits["float"], hits["simulated"]).drop
    return Simulation(
        scheme=reference.plan.scheme,
        n=len(images),
        images=images.source,
        top1=top1,
        drop=drop,
        agreement=Share.of(task.agree(parts["simulated"], parts["float"])),
        sqnr_db=sqnr_of(rows["float"], rows["simulated"]),
        task=model.task,
    )
