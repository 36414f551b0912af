"""Plugins by file name: the module `PACKAGE/NAME.py` is the plugin `NAME`.

A folder of plugins is a package whose `__init__` holds the Protocol that its files follow. Only the picked
file is imported, so that listing names costs nothing.
"""

import importlib
import pkgutil
from types import ModuleType

from calibrators.errors import RecipeError

__all__ = ["names", "pick"]


def names(package: str) -> tuple[str, ...]:
    """Names of the plugins in `package`, sorted."""
    path = importlib.import_module(package).__path__
    return tuple(sorted(module.name for module in pkgutil.iter_modules(path)))


def pick(package: str, name: str) -> ModuleType:
    """The plugin module `name` of `package`.

    Raises:
        RecipeError: There is no such plugin.
    """
    offered = names(package)
    if name not in offered:
        kind = package.rpartition(".")[2].removesuffix("s")
        raise RecipeError(
            what=f"there is no {kind} named `{name}`.",
            why=f"`{package}` holds {', '.join(offered)}.",
            fix="use one of those names.",
        )
    return importlib.import_module(f"{package}.{name}")
