"""Generators: recipes that make calibration images from a model alone; the file's name is the recipe's name."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from calibrators.images import ImageSet
from dfq_deploy.generation import GenerateOptions, Progress

if TYPE_CHECKING:  # the list of generators is shown without loading torch
    from torch import Tensor

    from dfq_deploy.models import Model

__all__ = ["ATTENTIVE", "STUDENTS", "AttentiveGenerator", "Generator"]

ATTENTIVE = ("spdfq",)
"""Generators that ask heads for attention, and whose parts can be left out: each is an `AttentiveGenerator`."""

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


class AttentiveGenerator(Generator, Protocol):
    """What each module in this folder that `ATTENTIVE` names offers, too."""

    def recipe_of(self, facts: Mapping[str, Any]) -> Generator:
        """The recipe that made a set with these facts: with the parts that it had."""
        ...

    def priors_of(self, model: "Model", facts: Mapping[str, Any]) -> "Iterator[Mapping[str, Tensor]]":
        """What heads of `model` were asked for where a set with these facts was made out of it, drawn again.

        Per batch and, by the tap's name, (images, windows, heads, tokens); none where none were asked for.
        """
        ...
