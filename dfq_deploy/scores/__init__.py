"""Scores: how well outputs match the truth, by the metrics of the field; one file per task that has a truth.

torchmetrics computes them. Agreement, which takes no truth, is the business of `dfq_deploy.tasks`. Top-1 accuracy, of
images that have labels, a check tells already.
"""

from typing import Any, Protocol

from torch import Tensor

__all__ = ["Score"]


class Score(Protocol):
    """What each module in this folder offers."""

    def metric(self, classes: int) -> Any:
        """The metric of torchmetrics, for a model that tells so many classes apart."""
        ...

    def add(self, metric: Any, found: dict[str, Tensor], truth: list[Any]) -> None:
        """Show the metric a batch: outputs by name, (N, …), and the truth of each image."""
        ...

    def read(self, metric: Any) -> dict[str, float]:
        """The scores after all batches, in percent, by the field's names."""
        ...
