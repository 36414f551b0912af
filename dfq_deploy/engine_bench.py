"""How fast an engine is, and how much memory it takes; two engines against each other, with no torch.

Both are called in turn, through the same `Runner` that production uses: NumPy in, NumPy out. A ratio is the median of
those of the rounds, with a bootstrap interval over the rounds; what slows the whole machine down leaves it alone.
Memory is measured by a process for each engine and batch.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from calibrators.errors import RecipeError
from dfq_deploy.machine import machine, versions_of
from dfq_deploy.peak_memory import peak_mib
from dfq_deploy.runtime import Runner, load
from dfq_deploy.watch import SILENT, Watch
from exporters.turns import FEWEST_ROUNDS, median_ratio, seconds_in_turn

__all__ = ["EngineBench", "Pace", "Ratio", "bench"]

_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "numpy")


@dataclass(frozen=True)
class Pace:
    """What one engine does with batches of one size.

    Attributes:
        engine: The folder of its bundle.
        batch: Images per call.
        calls: How many were timed.
        p50_ms: The median, in milliseconds per call.
        quartiles_ms: Between which the middle half of the calls lies; None if there are too few to have one.
        p95_ms: None if there are too few calls to tell.
        p99_ms: None if there are too few calls to tell.
        images_per_s: Images over all calls, one call at a time.
        peak_mib: Most memory of a process that loads it and answers one batch; None where the system does not say.
    """

    engine: str
    batch: int
    calls: int
    p50_ms: float
    quartiles_ms: tuple[float, float] | None
    p95_ms: float | None
    p99_ms: float | None
    images_per_s: float
    peak_mib: float | None


@dataclass(frozen=True)
class Ratio:
    """How many times as fast the engine is as the one it is held against.

    Attributes:
        batch: Images per call.
        faster: Its time into that of the other, the median over rounds.
        interval: 95 %, by bootstrap over the rounds; None if there are too few.
    """

    batch: int
    faster: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class EngineBench:
    """A benchmark of one engine or two.

    Attributes:
        engines: Model, scheme and run-time by folder.
        paces: By batch size, the engine and then the other one.
        ratios: By batch size; none for one engine.
        threads: What ONNX Runtime computed with; None for its own choice.
        machine: Processor, cores that may be used, and what ran in the minute before (load average).
        versions: Of what ran the engines.
    """

    engines: dict[str, str]
    paces: tuple[Pace, ...]
    ratios: tuple[Ratio, ...]
    threads: int | None
    machine: dict[str, str]
    versions: dict[str, str]

    def report(self) -> dict[str, Any]:
        """All of it as JSON."""
        return asdict(self)


def bench(
    folder: str | Path,
    *,
    vs: str | Path | None = None,
    batches: Sequence[int] = (1, 8),
    calls: int | None = None,
    seconds: float = 10.0,
    threads: int | None = None,
    provider: str | None = None,
    verify: str | Path | None = None,
    watch: Watch = SILENT,
) -> EngineBench:
    """How fast the engine of the bundle in `folder` is.

    Args:
        folder: A bundle, or a zip archive of one.
        vs: Another one to hold it against, called in turn with it.
        batches: Images per call.
        calls: Calls of each engine at each batch size; if None, as many as fit `seconds`.
        seconds: How long each batch size is measured, where `calls` does not say.
        threads: What ONNX Runtime computes a call with; as many as there are cores if None.
        provider: What runs both within ONNX Runtime, if not what they were exported for.
        verify: PEM file with the public key that each must be signed with.
        watch: Who is told how it goes.

    Raises:
        RecipeError: There is nothing to measure: no batch, no call, no time, or the same folder twice.
        BundleError: A bundle is incomplete or altered, or its engine is pending.
        BackendError: A run-time is not installed, cannot load its engine, or cannot run it.
    """
    folders = [Path(folder)] if vs is None else [Path(folder), Path(vs)]
    _refuse_nothing(folders, batches, calls, seconds)
    seen = machine()
    paces: list[Pace] = []
    ratios: list[Ratio] = []
    with ExitStack() as stack:
        runners = [
            stack.enter_context(load(each, provider=provider, threads=threads, verify=verify)) for each in folders
        ]
        for batch in dict.fromkeys(batches):
            watch.stage(f"batch {batch}", already_done=False)
            peaks = [peak_mib(each, batch, provider=provider, threads=threads) for each in folders]
            times = seconds_in_turn([_call(runner, batch) for runner in runners], rounds=calls, seconds=seconds)
            paces += [_pace(each, batch, own, peak) for each, own, peak in zip(folders, times.T, peaks, strict=True)]
            if len(folders) > 1:
                ratios.append(_ratio(batch, times))
        engines = {str(each): _named(runner) for each, runner in zip(folders, runners, strict=True)}
    return EngineBench(engines, tuple(paces), tuple(ratios), threads, seen, versions_of(_RUNTIMES))


def _refuse_nothing(folders: list[Path], batches: Sequence[int], calls: int | None, seconds: float) -> None:
    wrong = {
        "--batch": "it is the number of images in a call" if not batches or min(batches) < 1 else "",
        "--calls": "one call is the least" if calls is not None and calls < 1 else "",
        "--seconds": "it is how long is measured" if calls is None and not 0 < seconds < float("inf") else "",
        "--vs": "an engine is not held against itself" if len({f.resolve() for f in folders}) < len(folders) else "",
    }
    for flag, why in wrong.items():
        if why:
            raise RecipeError(what=f"{flag} leaves nothing to measure.", why=f"{why}.", fix=f"pass another {flag}.")


def _call(runner: Runner, batch: int) -> Callable[[], object]:
    images = np.random.default_rng(0).normal(size=(batch, *runner.manifest.preprocess.shape)).astype(np.float32)
    runner.warm_up(batch)
    return partial(runner, images)


def _pace(folder: Path, batch: int, seconds: np.ndarray, peak: float | None) -> Pace:
    low, median, high = (1000 * np.percentile(seconds, (25, 50, 75))).tolist()
    return Pace(
        engine=str(folder),
        batch=batch,
        calls=len(seconds),
        p50_ms=median,
        quartiles_ms=(low, high) if len(seconds) >= 4 else None,
        p95_ms=_tail_ms(seconds, 95),
        p99_ms=_tail_ms(seconds, 99),
        images_per_s=float(batch * len(seconds) / seconds.sum()),
        peak_mib=peak,
    )


def _tail_ms(seconds: np.ndarray, percent: int) -> float | None:
    enough = len(seconds) * (100 - percent) >= 100  # one call at least lies beyond it
    return float(1000 * np.percentile(seconds, percent)) if enough else None


def _ratio(batch: int, seconds: np.ndarray) -> Ratio:
    """Of times (rounds, 2)."""
    faster, low, high = median_ratio(seconds[:, 1], seconds[:, 0])
    return Ratio(batch, faster, (low, high) if len(seconds) >= FEWEST_ROUNDS else None)


def _named(runner: Runner) -> str:
    facts = runner.manifest
    return f"{facts.model.name}, {facts.scheme}, {facts.backend} {facts.engine.options.provider}".strip()
