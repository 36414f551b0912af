"""How far a run is, on the terminal: a line with a bar per stage."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

__all__ = ["shown_progress"]


class _Bar:
    """A stage's line and its progress bar."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def stage(self, name: str, already_done: bool) -> None:
        """Stop the last stage's clock and begin the next."""
        self._progress.start()
        if self._task is not None:
            self._progress.stop_task(self._task)
        note = "already done" if already_done else ""
        self._task = self._progress.add_task(name, total=1 if already_done else None, terms=note)
        if already_done:
            self._progress.update(self._task, completed=1)

    def progress(self, done: int, total: int, terms: Mapping[str, float]) -> None:
        """Move the bar."""
        assert self._task is not None
        text = "  ".join(f"{name} {value:.3g}" for name, value in terms.items())
        self._progress.update(self._task, completed=done, total=total, terms=text)

    def tell(self, text: str) -> None:
        """Print `text` above the lines."""
        self._progress.console.print(text, markup=False, highlight=False)


@contextmanager
def shown_progress() -> Iterator[_Bar]:
    """Who shows on the terminal's stderr how a run goes, as long as the block lasts."""
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(bar_width=16),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[terms]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
    )
    progress = Progress(*columns, console=Console(stderr=True), expand=True)
    try:
        yield _Bar(progress)
    finally:
        if progress.live.is_started:  # or it would print an empty line
            progress.stop()
