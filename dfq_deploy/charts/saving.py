"""From a figure to a file, whole or not at all."""

from pathlib import Path

from matplotlib.figure import Figure

from calibrators.errors import RecipeError
from calibrators.files import written_whole

__all__ = ["check_format", "save"]

_DPI = 150


def check_format(path: Path) -> None:
    """Return if matplotlib writes pictures of the format that the suffix of `path` names.

    Raises:
        RecipeError: It does not.
    """
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        raise RecipeError(
            what=f"`{path}` names no format of pictures.",
            why=f"its suffix is `{path.suffix}`, and matplotlib writes {', '.join(sorted(formats))}.",
            fix="pass a file that ends in .png or .svg.",
        )


def save(figure: Figure, path: Path) -> None:
    """Write the figure to `path`."""
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=_DPI)
