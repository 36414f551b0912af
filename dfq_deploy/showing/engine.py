"""What a person sees of an engine that ran: classes of images, and how fast it is. Nothing is computed here."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from dfq_deploy.messages import print_error
from dfq_deploy.showing.console import console

if TYPE_CHECKING:  # both load the run-time, which --help does not wait for
    from dfq_deploy.engine_bench import EngineBench
    from dfq_deploy.inferring import Answer

__all__ = ["print_answers", "print_answers_as_json", "print_engine_bench"]


def print_answers(answers: "list[Answer]") -> None:
    """The most likely classes of each image; those that could not be read are errors, on stderr."""
    for answer in answers:
        if answer.error is not None:
            print_error(answer.error.what, answer.error.why, answer.error.fix)
            continue
        console.print(answer.image, style="bold")
        for guess in answer.classes:
            console.print(f"  {100 * guess.probability:6.2f} %  {guess.index:>5}  {guess.name}")


def print_answers_as_json(answers: "list[Answer]") -> None:
    """One list, an object for each image: `classes`, or `error` with what, why and fix."""
    rows = [
        {"image": a.image, "error": {"what": a.error.what, "why": a.error.why, "fix": a.error.fix}}
        if a.error
        else {"image": a.image, "classes": [vars(guess) for guess in a.classes]}
        for a in answers
    ]
    print(json.dumps(rows, indent=1))  # not through the console, which may break lines


def print_engine_bench(found: "EngineBench", file: Path | None) -> None:
    """A benchmark of engines: a row for each engine and batch size, the ratios, and what may have disturbed it."""
    for folder, facts in found.engines.items():
        console.print(f"{folder}: {facts}")
    names = {folder: Path(folder).name for folder in found.engines}
    if len(set(names.values())) < len(names):
        names = {folder: folder for folder in found.engines}
    table = Table(box=None, pad_edge=False)
    table.add_column("engine", overflow="fold")
    for column in ("batch", "calls", "p50\nms", "middle half\nms", "p95\nms", "p99\nms", "images/s", "peak\nMiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for pace in found.paces:
        table.add_row(
            names[pace.engine],
            str(pace.batch),
            str(pace.calls),
            _ms(pace.p50_ms),
            " to ".join(map(_ms, pace.quartiles_ms)) if pace.quartiles_ms else "-",
            _ms(pace.p95_ms),
            _ms(pace.p99_ms),
            f"{pace.images_per_s:.1f}",
            f"{pace.peak_mib:.0f}" if pace.peak_mib is not None else "-",
        )
    console.print(table)
    for ratio in found.ratios:
        this, other = names.values()
        faster, told = f"{ratio.faster:.2f}x", ": too few calls to say how certain that is"
        if ratio.interval is not None:
            low, high = ratio.interval
            faster += f" ({low:.2f} to {high:.2f})"
            told = "" if low > 1 or high < 1 else ": no difference can be told"
        console.print(f"batch {ratio.batch}: {this} is {faster} as fast as {other}{told}")
    console.print("peak: of a process of its own, libraries included; what a GPU holds is not in it")
    threads = found.threads or "its own choice"
    console.print("{processor}, {cores} cores, load average {load_average} before".format(**found.machine))
    console.print(f"ONNX Runtime's threads: {threads}")
    if file is not None:
        console.print(f"written: {file}")


def _ms(value: float | None) -> str:
    """Four digits, of which two at most are behind the point."""
    return "-" if value is None else f"{value:.{2 if value < 100 else 1 if value < 1000 else 0}f}"
