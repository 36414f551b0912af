"""The commands that repeat a run, spelt out, with nothing in them that only the machine of that run has."""

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import PurePath
from typing import Any

from dfq_deploy.recipe import Recipe
from dfq_deploy.reporting.checked import Checked
from exporters.bundle import Manifest

__all__ = ["check_command", "export_command", "neutral", "python_calls"]


def export_command(recipe: Mapping[str, Any], name: str) -> str:
    """The export that made a bundle, into a folder called `name`: the model, and each field that is not as by default.

    Args:
        recipe: The manifest's recipe.
        name: The bundle's folder.
    """
    words = ["dfq-deploy", "export"]
    for field in fields(Recipe):
        value = recipe.get(field.name)
        if value is None or (field.default is not MISSING and value == field.default):
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            text = PurePath(str(value)).name if field.name == "checkpoint" else str(value)
            words += [flag, neutral(text) if field.name == "calib" else text]
    return shlex.join([*words, "--out", name])


def check_command(checked: Checked, name: str) -> str:
    """The check of the bundle in the folder `name`; empty where that was not recorded."""
    if checked.asked is None:
        return ""
    words = [word for key, value in _asked(checked).items() for word in (f"--{key}", str(value))]
    return shlex.join(["dfq-deploy", "check", name, *words])


def python_calls(manifest: Manifest, checked: Checked | None, name: str) -> tuple[str, str]:
    """The export and the check of a bundle whose model came from `wrap`: only Python has that."""
    wrapped = f'dfq_deploy.wrap({manifest.model.name}(…), example, task="{manifest.model.task}")'
    own = {field.name: field.default for field in fields(Recipe) if field.name != "model"}
    given = manifest.recipe | {"calib": neutral(str(manifest.recipe["calib"]))}
    made = "".join(f", {key}={value!r}" for key, value in given.items() if own.get(key, value) != value)
    judged = "".join(f", {key}={value!r}" for key, value in _asked(checked).items())
    return f'dfq_deploy.export({wrapped}, "{name}"{made})', f'dfq_deploy.check("{name}", model={wrapped}{judged})'


def _asked(checked: Checked | None) -> dict[str, str | int]:
    """What the check was told to use."""
    if checked is None or checked.asked is None:
        return {}
    images, limit = checked.asked.images, checked.asked.limit
    return ({} if images is None else {"images": neutral(images)}) | ({} if limit is None else {"limit": limit})


def neutral(place: str) -> str:
    """`place`, as --calib and --images take it, without the folders that lead there."""
    kind, colon, path = place.partition(":")
    if colon:
        return f"{kind}:{PurePath(path).name}"
    return ",".join(PurePath(part).name for part in place.split(","))
