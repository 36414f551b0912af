"""What people see of serving: where a server listens, what it did, and what a model repository holds."""

from typing import TYPE_CHECKING

from dfq_deploy.showing.console import console

if TYPE_CHECKING:  # the server's imports are those of the extra `serve`
    from dfq_deploy.serving.server import Tally
    from dfq_deploy.serving.triton import Repository

__all__ = ["print_listening", "print_repository", "print_tally"]


def print_listening(address: str, models: list[str]) -> None:
    """Where the server listens, and what it serves."""
    console.print(f"{address}: {' and '.join(models)}; metrics at {address}/metrics; Ctrl-C stops")


def print_tally(tally: "Tally") -> None:
    """What the server did."""
    console.print(
        f"stopped: {tally.answered} request{'' if tally.answered == 1 else 's'} answered, {tally.refused} refused"
    )


def print_repository(repository: "Repository") -> None:
    """What was written."""
    console.print(f"{repository.folder}: {', '.join(repository.models)}", style="bold")
    for note in repository.notes:
        console.print(f"  {note}")
