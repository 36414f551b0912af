"""What goes wrong, in plain words on stderr: an error in three lines, a note in one."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape

from calibrators.errors import CalibrationWarning

__all__ = ["notes_in_one_line", "print_error"]


@contextmanager
def notes_in_one_line() -> Iterator[None]:
    """Our own warnings come out without the place in the code that gave them; Pillow's are left out.

    Pillow warns of pictures that are read as timm reads them, or are refused by an error that says more.
    """
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, CalibrationWarning):
            console = Console(stderr=True, highlight=False, soft_wrap=True)
            console.print(f"[bold yellow]note:[/] {escape(str(message))}")
        else:
            usual(message, category, *place)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def print_error(what: str, why: str, fix: str) -> None:
    """An error in three lines."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[bold red]error:[/] {escape(what)}\n  [bold]why:[/] {escape(why)}\n  [bold]fix:[/] {escape(fix)}")
