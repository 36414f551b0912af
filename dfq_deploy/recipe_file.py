"""A recipe as a TOML file: what `--recipe` reads, and what each bundle holds as `recipe.toml`."""

import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from calibrators.errors import RecipeError
from calibrators.files import write_text
from dfq_deploy.recipe import Recipe

__all__ = ["fields_in", "save_recipe"]


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe as TOML; `--recipe` reads it again."""
    write_text(path, tomli_w.dumps(recipe.facts()))


def fields_in(path: Path) -> dict[str, Any]:
    """The fields in the TOML file `path`, by name; they are checked where a recipe is made of them.

    Raises:
        RecipeError: It cannot be read, or holds more than fields.
    """
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise RecipeError(
            what=f"`{path}` cannot be read as a recipe.",
            why=f"{cause}.",
            fix="pass a TOML file; each bundle holds its own, recipe.toml.",
        ) from cause
    tables = [name for name, value in fields.items() if isinstance(value, dict)]
    if tables:
        raise RecipeError(
            what=f"`{path}` has a table `[{tables[0]}]`.",
            why="a recipe is flat: a field per line, named as its flag.",
            fix="take the line out.",
        )
    return fields
