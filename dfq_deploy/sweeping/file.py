"""A sweep as a TOML file: the fields of a recipe, some of which have several values, and what a run needs of a machine.

A list stands for one run with each of its values, two lists for all pairs of theirs, and so on. A value in a list may
be an inline table of fields that go together, such as a model and its checkpoint. All is checked before the first run.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from calibrators.errors import RecipeError
from calibrators.files import fingerprint_of
from dfq_deploy.recipe import Recipe
from dfq_deploy.recipe_file import check_fields, fields_in, recipe_of

__all__ = ["NAMED_BY", "Needs", "SweepRun", "runs_in"]


NAMED_BY = ("model", "scheme", "generator", "backend")
"""The fields of a recipe that a run is called by."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run gets: CPUs, GPUs and memory are reserved for it on a Ray cluster.

    Attributes:
        cpus: Threads that it computes with; None: as many as where the sweep begins.
        gpus: GPUs.
        memory: GiB.
    """

    cpus: int | None = None
    gpus: int = 0
    memory: float = 0.0

    def __post_init__(self) -> None:
        if (self.cpus is not None and self.cpus < 1) or self.gpus < 0 or not 0 <= self.memory < float("inf"):
            raise RecipeError(
                what=f"cpus = {self.cpus}, gpus = {self.gpus}, memory = {self.memory:g} can be given to no run.",
                why="it takes one CPU or more, and GPUs and GiB from 0 on.",
                fix="correct them in the sweep's file.",
            )


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: What its folder is called.
        recipe: What it makes.
        needs: What it gets.
    """

    name: str
    recipe: Recipe
    needs: Needs


def runs_in(path: Path) -> tuple[SweepRun, ...]:
    """The runs that the file `path` asks for, the last list varying first.

    Raises:
        RecipeError: It cannot be read, has a field that is none, a value that is none, or the same run twice.
    """
    runs = [_run(found, path) for found in _combined(fields_in(path), path)]
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(
            what=f"`{path}` asks for {twice} twice.",
            why="two runs with one recipe would write to one folder.",
            fix="name each value once.",
        )
    return tuple(runs)


def _combined(found: Mapping[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    """The fields of each run."""
    choices: list[list[dict[str, Any]]] = []
    for name, value in found.items():
        values = value if isinstance(value, list) else [value]
        choices.append([one if isinstance(one, dict) else {name: one} for one in values])
        check_fields([name, *(key for choice in choices[-1] for key in choice)], (Recipe, Needs), path)
        if not values:
            raise RecipeError(
                what=f"`{path}` gives `{name}` no value.",
                why="the list is empty, and so there would be no run.",
                fix="name a value, or take the line out.",
            )
    for chosen in itertools.product(*choices):
        together: dict[str, Any] = {}
        for fields_of_one in chosen:
            if again := together.keys() & fields_of_one.keys():
                raise RecipeError(
                    what=f"`{path}` gives `{min(again)}` twice for one run.",
                    why="two lists, or a line and an inline table, name it.",
                    fix="take one of them out.",
                )
            together |= fields_of_one
        yield together


def _run(found: Mapping[str, Any], path: Path) -> SweepRun:
    of_needs = {field.name for field in fields(Needs)}
    needs = recipe_of(Needs, {name: value for name, value in found.items() if name in of_needs}, path)
    recipe = recipe_of(Recipe, {name: value for name, value in found.items() if name not in of_needs}, path)
    words = (*(getattr(recipe, field) for field in NAMED_BY), fingerprint_of(recipe.facts())[:8])
    return SweepRun("-".join(re.sub(r"[^\w.]+", "_", word) for word in words), recipe, needs)
