"""What a person sees of what the doctor found."""

from typing import TYPE_CHECKING

from rich.text import Text

from dfq_deploy.showing.console import COLOURS, console

if TYPE_CHECKING:  # it asks for CUDA
    from dfq_deploy.doctor import Finding

__all__ = ["print_findings"]


def print_findings(findings: "list[Finding]") -> int:
    """What the doctor found; returns 1 if there is a problem."""
    for finding in findings:
        state = (f"{finding.state:>8}", COLOURS[finding.state])
        console.print(Text.assemble(state, f"  {finding.subject}: {finding.text}"))
    return int(any(finding.state == "problem" for finding in findings))
