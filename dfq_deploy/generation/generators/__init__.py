"""Generators: recipes that make calibration images from a model alone; the file's name is the recipe's name."""

from typing import TYPE_CHECKING, Protocol

from calibrators.images import ImageSet
from dfq_deploy.generation import GenerateOptions, Progress

if TYPE_CHECKING:  # the list of generators is shown without loading torch
    from dfq_deploy.models import Model

__all__ = ["STUDENTS", "Generator"]

STUDENTS = ("psaq_v2",)
"""Generators that teach a student: what they make depends on the number formats that it learns for."""


class Generator(Protocol):
    """What each module in this folder offers."""

    def generate(self, model: "Model", options: GenerateOptions, *, progress: Progress = ...) -> ImageSet:
        """`options.count` images for `model`, within the values of real ones, with the facts that repeat them.

        The same model, options and machine give the same bytes. More than 32 images are made in batches; the first
        ones do not depend on how many follow. Those in `STUDENTS` hand back a student with them.

        Raises:
            ImagesError: The model offers nothing that the recipe can work with, or the synthesis broke down.
        """
        ...
