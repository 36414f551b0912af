"""Tasks: what a model puts out, and how far two models say the same of an image; one file per task.

A model's outputs come as named arrays. A task knows which of them it needs and what they say. Agreement takes no
labels, so that it can be measured on synthetic images too. No torch here, and nothing of any model.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from calibrators.errors import ModelError
from calibrators.registry import pick
from exporters.outputs import Output

__all__ = ["Found", "Shapes", "Task", "task_named", "unsuitable"]

Found: TypeAlias = Mapping[str, np.ndarray]
"""Outputs by the task's names, each (N, …)."""
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""The shape for one image of every tensor that a model puts out, by the model's names."""


class Task(Protocol):
    """What each module in this folder offers.

    Attributes:
        AGREEMENT: What `agree` measures, for people.
        CROP_MODE: How a picture becomes an image: `squash` where outputs say what lies where, so that nothing may be
            cut off, else `center`.
        TAKES_ALL: Whether every tensor that a model puts out is needed; else what the task does not know is left out.
    """

    AGREEMENT: str
    CROP_MODE: Literal["center", "squash"]
    TAKES_ALL: bool

    def pick_outputs(self, shapes: Shapes) -> dict[str, str]:
        """Those of a model's tensors that the task needs, and what it calls each, in the order of an engine's outputs.

        Raises:
            ModelError: These are not the outputs of such a model.
        """
        ...

    def count_classes(self, outputs: Sequence[Output]) -> int:
        """How many classes a model with these outputs tells apart; 0 where it knows none."""
        ...

    def decide(self, found: Found) -> np.ndarray | None:
        """The class of each image, (N,) int64; None where the task has no one class for an image."""
        ...

    def agree(self, found: Found, wanted: Found) -> np.ndarray:
        """How far two models say the same of each image, (N,) float64 from 0 to 1."""
        ...


def task_named(name: str) -> Task:
    """The task of that name.

    Raises:
        RecipeError: There is none.
    """
    found: Any = pick("dfq_deploy.tasks", name)
    task: Task = found
    return task


def unsuitable(shapes: Shapes, task: str, wanted: str) -> ModelError:
    """The error for a model whose outputs are not those of `task`, which wants something else, in words."""
    found = ", ".join(f"`{name}` (N, {', '.join(map(str, shape))})" for name, shape in shapes.items())
    return ModelError(
        what=f"these are no outputs of the task {task}: {found or 'none'}.",
        why=f"it wants {wanted}.",
        fix="pass another task, or a module that returns a dict of what is wanted.",
    )
