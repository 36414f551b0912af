"""What a person sees of a gate on the terminal: each check with its verdict, what was left out, and the power."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:  # it needs scipy, which --help does not wait for
    from dfq_deploy.gating.result import GateResult

__all__ = ["print_gate"]

_console = Console(highlight=False, markup=False, soft_wrap=True)
_COLOURS = {"pass": "green", "fail": "red", "undecided": "yellow", "left out": "dim"}


def print_gate(found: "GateResult") -> None:
    """The checks, the verdict last."""
    _console.print(found.told)
    rows = [(check.verdict, check.name, check.reason) for check in found.checks]
    for verdict, name, reason in [*rows, *(("left out", name, why) for name, why in found.left_out.items())]:
        _console.print(Text.assemble((f"{verdict:>9}", _COLOURS[verdict]), f"  {name}: {reason}"))
    if found.changes:
        _console.print("baseline:")
    for line in found.changes:
        _console.print(f"  {line}")
    if found.power:
        _console.print(found.power)
    decided = [check.name for check in found.checks if check.verdict == found.verdict != "pass"]
    _console.print(Text.assemble((found.verdict, _COLOURS[found.verdict]), f": {', '.join(decided) or 'every check'}"))
