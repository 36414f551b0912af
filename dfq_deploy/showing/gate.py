"""What a person sees of a gate on the terminal: each check with its verdict, what was left out, and the power."""

from typing import TYPE_CHECKING

from rich.text import Text

from dfq_deploy.showing.console import COLOURS, console

if TYPE_CHECKING:  # it needs scipy, which --help does not wait for
    from dfq_deploy.gating.result import GateResult

__all__ = ["print_gate"]


def print_gate(found: "GateResult") -> None:
    """The checks, the verdict last."""
    console.print(found.told)
    rows = [(check.verdict, check.name, check.reason) for check in found.checks]
    for verdict, name, reason in [*rows, *(("left out", name, why) for name, why in found.left_out.items())]:
        console.print(Text.assemble((f"{verdict:>9}", COLOURS[verdict]), f"  {name}: {reason}"))
    if found.changes:
        console.print("baseline:")
    for line in found.changes:
        console.print(f"  {line}")
    if found.power:
        console.print(found.power)
    decided = [check.name for check in found.checks if check.verdict == found.verdict != "pass"]
    console.print(Text.assemble((found.verdict, COLOURS[found.verdict]), f": {', '.join(decided) or 'every check'}"))
