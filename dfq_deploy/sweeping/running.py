"""A sweep: many exports, each with a folder and a process of its own, and one table over all of them.

What a run came to is kept in the sweep's `work/`, so that a sweep that was stopped goes on with the runs that are
missing, and with those that failed. Runs that share a stage, such as the images of one model, make it once, if they do
not make it at the same time. Which of them runs when, and where, is the workers' business.
"""

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrators.errors import BackendError, DeployError, RecipeError
from calibrators.files import clear_unfinished, fingerprint_of, write_json
from dfq_deploy.building import built_with
from dfq_deploy.messages import notes_in_one_line
from dfq_deploy.opening import engine_bytes
from dfq_deploy.pipeline import export
from dfq_deploy.recipe import Recipe
from dfq_deploy.sweeping.file import SweepRun, runs_in
from dfq_deploy.sweeping.results import Outcome, Sweep
from dfq_deploy.watch import SILENT, Watch
from dfq_deploy.workers import Order, Task, threads_here, workers_at
from dfq_deploy.workspace import held
from exporters.bundle import MANIFEST, open_bundle

__all__ = ["sweep"]

_FIGURES = ("verdict", "reason", "n", "images", "top1", "drop", "agreement", "intervals_95", "sqnr_db", "floor_ratio")
_PATIENCE = 60  # seconds


def sweep(
    file: str | Path,
    out: str | Path | None = None,
    *,
    images: str | None = None,
    limit: int | None = None,
    ray: str | None = None,
    watch: Watch = SILENT,
) -> Sweep:
    """Export every combination that the TOML file `file` names, each by itself, and write one table over all.

    Args:
        file: Fields of a recipe; a list of values stands for a run with each (see `sweeping.file`).
        out: Folder of `sweep.json`, `sweep.md` and a bundle for each run. None: as the file is called, without its
            suffix. Runs that an earlier sweep in it finished are not run again.
        images: What to check on (`folder:PATH`, `npz:PATH`, a file); see `check`.
        limit: Check on this many images, evenly spaced.
        ray: Address of a Ray cluster that carries out the runs, HOST:PORT or `auto`; its machines share `out`. None:
            they are carried out here, one after the other.
        watch: Told how it goes, and of each run when it is over.

    Raises:
        RecipeError: The file asks for something that is none, or another sweep is working in the folder; nothing was
            started.
        BackendError: There is no such cluster.
    """
    file = Path(file)
    runs = runs_in(file)
    out = file.with_suffix("") if out is None else Path(out)
    with workers_at(ray) as workers, held(out) as work:
        clear_unfinished(out)
        clear_unfinished(work)
        results = [work / f"run-{fingerprint_of(_facts(run, images, limit))[:16]}.json" for run in runs]
        bundles = [out / run.name / MANIFEST for run in runs]
        missing = [n for n, result in enumerate(results) if not (result.exists() and bundles[n].is_file())]
        errors: dict[int, DeployError] = {}
        watch.stage("runs", not missing)
        done = len(runs) - len(missing)
        if missing:
            watch.progress(done, len(runs), {})
        order = _order([runs[number] for number in missing], _Sweep(out.resolve(), images, limit))
        for place, answer in workers.answers(order) if missing else ():
            number = missing[place]
            if isinstance(answer, DeployError):
                errors[number] = answer
            else:
                write_json(results[number], answer)
            watch.tell(str(_outcome(runs[number], results[number], errors.get(number))))
            done += 1
            watch.progress(done, len(runs), {})
        outcomes = [_outcome(run, results[number], errors.get(number)) for number, run in enumerate(runs)]
        found = Sweep(tuple(outcomes), built_with())
        found.save(out)
    return found


def _facts(run: SweepRun, images: str | None, limit: int | None) -> list[Any]:
    """What the outcome of a run depends on: files that it reads count as changed where their size or time is."""
    read = [str(run.recipe.checkpoint or ""), run.recipe.calib, images or ""]
    return [run.name, images, limit, [_state_of(place) for place in read], built_with()]


def _state_of(place: str) -> list[tuple[str, int, int]]:
    """Name, size and time of each file at `place`: a path, KIND:PATH, or several paths with commas between them."""
    found = []
    for part in [place] if Path(place).is_file() else place.split(","):
        path = Path(part.partition(":")[2] or part)
        files = sorted(path.rglob("*")) if part and path.is_dir() else [path] if part and path.is_file() else []
        found += [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return found


@dataclass(frozen=True)
class _Sweep:
    """What the runs of a sweep share."""

    out: Path
    images: str | None
    limit: int | None


def _order(runs: Sequence[SweepRun], shared: _Sweep) -> Order:
    tasks = [
        Task((run.name, run.recipe), run.needs.cpus or threads_here(), run.needs.gpus, run.needs.memory) for run in runs
    ]
    return Order(_carry_out, shared, tasks, fresh=True)


def _carry_out(asked: _Sweep, name: str, recipe: Recipe) -> dict[str, Any]:
    """What a worker does: one export, told in figures."""
    if not (asked.out / "work").is_dir():
        raise BackendError(
            what=f"there is no `{asked.out}` on this machine.",
            why="the machines of the cluster do not share the sweep's folder.",
            fix="pass --out with a folder that all of them see.",
        )
    began, folder = time.monotonic(), asked.out / name
    _wait_until_free(folder)
    with notes_in_one_line():
        found = export(recipe, folder, images=asked.images, limit=asked.limit, others=asked.out).report()
    figures = {figure: found[figure] for figure in _FIGURES}
    size = engine_bytes(folder, open_bundle(folder))
    return {**figures, "bytes": size, "seconds": round(time.monotonic() - began, 1)}


def _wait_until_free(folder: Path) -> None:
    """Wait for the process of a machine that was given up, which may have a few seconds to live yet."""
    for _ in range(_PATIENCE):
        with contextlib.suppress(RecipeError), held(folder):
            return
        time.sleep(1)


def _outcome(run: SweepRun, result: Path, error: DeployError | None) -> Outcome:
    recipe = run.recipe.facts()
    if error is not None:
        return Outcome(run.name, recipe, None, {"what": error.what, "why": error.why, "fix": error.fix})
    return Outcome(run.name, recipe, json.loads(result.read_text(encoding="utf-8")), None)
