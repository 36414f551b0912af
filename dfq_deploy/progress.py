"""How far a run is, on the terminal: a line with a bar per stage."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

__all__ = ["shown_progress"]


class _TimeLeft(ProgressColumn):
    """How long a stage will take yet, by what it took so far; counts down until there is news.

    From the first news on, where rich's own column waits for the second and then stands still between two.
    """

    def render(self, task: Task) -> Text:
        """Hours, minutes and seconds; dashes where nothing is known."""
        elapsed, news = task.finished_time or task.elapsed, task.fields["news"]
        if task.total is None:
            return Text("")
        if task.finished or not task.completed or elapsed is None or news is None:
            return Text("0:00:00" if task.finished else "-:--:--", "progress.remaining")
        left = news * (task.total / task.completed - 1) - (elapsed - news)
        return Text(str(timedelta(seconds=max(0, round(left)))), "progress.remaining")


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
        self._task = self._progress.add_task(name, total=1 if already_done else None, terms=note, news=None)
        if already_done:
            self._progress.update(self._task, completed=1)

    def progress(self, done: int, total: int, terms: Mapping[str, float]) -> None:
        """Move the bar."""
        assert self._task is not None
        text = "  ".join(f"{name}={value:.3g}" for name, value in terms.items())
        news = next(task.elapsed for task in self._progress.tasks if task.id == self._task)
        self._progress.update(self._task, completed=done, total=total, terms=text, news=news)

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
        _TimeLeft(),
        TextColumn("{task.fields[terms]}", table_column=Column(ratio=1, overflow="fold")),
    )
    progress = Progress(*columns, console=Console(stderr=True), expand=True)
    try:
        yield _Bar(progress)
    finally:
        if progress.live.is_started:  # or it would print an empty line
            progress.stop()
