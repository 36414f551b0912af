"""The engine benchmark: its figures are those of the times, and its memory is that of another process."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dfq_deploy as dfq
from calibrators.errors import BackendError, BundleError, RecipeError
from dfq_deploy import engine_bench
from dfq_deploy.engine_bench import EngineBench
from dfq_deploy.peak_memory import peak_mib
from dfq_deploy.showing.engine import print_engine_bench


@pytest.fixture(scope="module")
def other(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "bundle"
    shutil.copytree(demo_bundle, folder, ignore=shutil.ignore_patterns("work"))
    return folder


@pytest.fixture
def timed(demo_bundle: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A benchmark of two engines whose times are those given, in seconds, (rounds, 2)."""
    monkeypatch.setattr(engine_bench, "peak_mib", lambda *_, **__: None)

    def made(times: np.ndarray, batch: int = 1) -> EngineBench:
        monkeypatch.setattr(engine_bench, "seconds_in_turn", lambda *_, **__: times)
        return dfq.bench(demo_bundle, vs=other, batches=[batch])

    return made


def test_figures_are_those_of_the_times(timed: Any, demo_bundle: Path, other: Path) -> None:
    times = np.stack([np.arange(1, 102) / 1000, np.full(101, 0.5)], 1)
    found = timed(times, batch=4)
    this, that = found.paces
    assert (this.engine, that.engine) == (str(demo_bundle), str(other))
    assert (this.calls, this.batch) == (101, 4)
    assert this.p50_ms == pytest.approx(51)
    assert this.quartiles_ms == pytest.approx((26, 76))
    assert (this.p95_ms, this.p99_ms) == pytest.approx((96, 100))
    assert this.images_per_s == pytest.approx(4 * 101 / (0.001 * 101 * 102 / 2))
    assert that.images_per_s == pytest.approx(8)
    (ratio,) = found.ratios
    assert ratio.faster == pytest.approx(0.5 / 0.051)
    assert ratio.interval is not None
    assert ratio.interval[0] < ratio.faster < ratio.interval[1]


@pytest.mark.parametrize(("calls", "told"), [(1, 0), (19, 0), (20, 1), (99, 1), (100, 2)])
def test_a_tail_is_told_only_if_a_call_lies_in_it(timed: Any, calls: int, told: int) -> None:
    pace = timed(np.ones((calls, 2))).paces[0]
    assert sum(tail is not None for tail in (pace.p95_ms, pace.p99_ms)) == told


def test_few_calls_have_no_interval(timed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    times = np.array([[0.010, 0.030], [0.020, 0.030]])
    assert [timed(np.tile(times, (pairs, 1))).ratios[0].interval is None for pairs in (1, 2, 3)] == [True, True, False]
    assert [timed(np.tile(times, (pairs, 1))).paces[0].quartiles_ms is None for pairs in (1, 2)] == [True, False]
    print_engine_bench(timed(times), None)
    assert ": too few calls to say how certain that is" in capsys.readouterr().out


def test_what_slows_the_machine_down_leaves_the_ratio_alone(timed: Any) -> None:
    slow = np.random.default_rng(0).lognormal(0, 2, (40, 1))
    (ratio,) = timed(slow * [0.002, 0.006]).ratios
    assert ratio.interval is not None
    assert (ratio.faster, *ratio.interval) == pytest.approx((3, 3, 3))


def test_two_real_engines(demo_bundle: Path, other: Path) -> None:
    found = dfq.bench(demo_bundle, vs=other, batches=(1, 3, 1), calls=4, threads=1)
    assert [(pace.engine, pace.batch, pace.calls) for pace in found.paces] == [
        (str(folder), batch, 4) for batch in (1, 3) for folder in (demo_bundle, other)
    ]
    assert [ratio.batch for ratio in found.ratios] == [1, 3]
    assert found.engines == dict.fromkeys(map(str, (demo_bundle, other)), "demo, w8a8, ort cpu")
    assert all(pace.p50_ms > 0 and pace.peak_mib and pace.peak_mib > 20 for pace in found.paces)
    report = json.loads(json.dumps(found.report()))
    assert report["threads"] == 1
    assert report["paces"][0]["peak_mib"] == found.paces[0].peak_mib
    assert {"onnxruntime", "numpy"} <= report["versions"].keys()


def test_memory_is_that_of_another_process_and_grows_with_the_batch(demo_bundle: Path) -> None:
    ours = np.ones(2**26)  # half a GiB that this process holds
    small, large = (peak_mib(demo_bundle, batch, threads=1) for batch in (1, 64))
    assert small is not None
    assert large is not None
    assert small + 5 < large
    assert small < ours.nbytes / 2**20


def test_memory_is_not_made_up_where_the_system_does_not_say(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfq_deploy.machine._STATUS", tmp_path / "status")
    assert peak_mib(demo_bundle, 1) is None


def test_a_process_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="a process of its own could not run") as caught:
        peak_mib(tmp_path / "nothing", 1)
    assert "is not a bundle" in caught.value.why
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"batches": ()}, "--batch"),
        ({"batches": (1, 0)}, "--batch"),
        ({"calls": 0}, "--calls"),
        ({"seconds": 0.0}, "--seconds"),
        ({"seconds": float("inf")}, "--seconds"),
        ({"seconds": float("nan")}, "--seconds"),
    ],
    ids=str,
)
def test_nothing_to_measure_is_refused(demo_bundle: Path, options: dict[str, Any], flag: str) -> None:
    with pytest.raises(RecipeError, match=f"{flag} leaves nothing to measure"):
        dfq.bench(demo_bundle, **options)


def test_an_engine_is_not_held_against_itself_or_nothing(demo_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(demo_bundle)
    with pytest.raises(RecipeError, match="--vs leaves nothing"):
        dfq.bench(demo_bundle, vs=tmp_path / "link")
    with pytest.raises(BundleError, match="is not a bundle"):
        dfq.bench(demo_bundle, vs=tmp_path)
