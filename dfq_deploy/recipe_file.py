"""A recipe as a TOML file: what `--recipe` reads, and what each bundle holds as `recipe.toml`."""

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import TypeAdapter, ValidationError

from calibrators.errors import RecipeError
from calibrators.files import write_text
from dfq_deploy.recipe import Recipe

__all__ = ["check_fields", "fields_in", "recipe_of", "save_recipe"]

_Kind = TypeVar("_Kind")


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe as TOML; `--recipe` reads it again."""
    write_text(path, tomli_w.dumps(recipe.facts()))


def fields_in(path: Path) -> dict[str, Any]:
    """The fields in the TOML file `path`, by name; they are checked where a recipe is made of them.

    Raises:
        RecipeError: It cannot be read, or holds more than fields.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise RecipeError(
            what=f"`{path}` cannot be read as a recipe.",
            why=f"{cause}.",
            fix="pass a TOML file; each bundle holds its own, recipe.toml.",
        ) from cause
    tables = [name for name, value in found.items() if isinstance(value, dict)]
    if tables:
        raise RecipeError(
            what=f"`{path}` has a table `[{tables[0]}]`.",
            why="a recipe is flat: a field per line, named as its flag.",
            fix="take the line out.",
        )
    return found


def check_fields(names: Iterable[str], kinds: Iterable[type], path: Path) -> None:
    """Return if each of `names`, which stand in the file `path`, is a field of one of the classes `kinds`.

    Raises:
        RecipeError: One is not.
    """
    known = [field.name for kind in kinds for field in fields(kind)]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            raise RecipeError(
                what=f"`{path}` has a field `{name}`, which is none.",
                why=f"fields like it: {', '.join(close)}." if close else f"there are {', '.join(known)}.",
                fix="correct it, or take the line out.",
            )


def recipe_of(kind: type[_Kind], found: Mapping[str, Any], path: Path) -> _Kind:
    """The recipe of class `kind` with these fields, which stand in the file `path` and were checked by name.

    Raises:
        RecipeError: A value is of another type, a field that has no default is missing, or they do not go together.
    """
    try:
        return TypeAdapter(kind).validate_python(found)
    except ValidationError as cause:
        first = cause.errors()[0]
        raise RecipeError(
            what=f"`{path}` has no sound `{first['loc'][0]}`.",
            why=f"{first['msg']}: {first['input']!r}." if first["type"] != "missing" else "it is missing.",
            fix="see dfq-deploy export --help for what it takes.",
        ) from cause
