"""The line on the terminal: loss terms and the time that is left, from the first news on."""

import io

import pytest
from rich.console import Console

from dfq_deploy import progress


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_terms_and_time_left_are_shown_and_count_down(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seen = _Clock(), io.StringIO()
    console = Console(file=seen, width=80, get_time=clock)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    with progress.shown_progress() as watch:
        watch.stage("images", False)

        def line() -> str:
            seen.seek(0)
            seen.truncate()
            console.print(watch._progress.get_renderable())
            return " ".join(seen.getvalue().split())

        assert "-:--:--" not in line(), "nothing is known, not even how much there is to do"
        clock.now = 20.0
        terms = {"patch_similarity": -2.25, "cross_entropy": 0.0572, "total_variation": 1590.0}
        watch.progress(10, 100, terms)
        said = line()
        assert "0:00:20 0:03:00" in said
        for term in ("patch_similarity=-2.25", "cross_entropy=0.0572", "total_variation=1.59e+03"):
            assert term in said
        clock.now = 30.0
        assert "0:00:30 0:02:50" in line(), "it stands still until there is news"
        watch.progress(100, 100, terms)
        assert "0:00:30 0:00:00" in line()
