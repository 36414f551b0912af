"""The runner: what it takes, that threads and ragged requests get their own answers, and how it closes."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import dfq_deploy as dfq
from calibrators.errors import BackendError, DeployError, ImagesError
from exporters.backends import BuildOptions, Engine, rtx, trt
from exporters.bundle import open_bundle

SHAPE = (3, 32, 32)
CLASSES = 10


class Checking:
    """An engine that gives each image's own first pixel, and notes what no engine may be asked for."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.wrong: list[str] = []
        self.closed = 0
        self.running = 0
        self._lock = threading.Lock()
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        with self._lock:
            self.running += 1
            self.sizes.append(len(images))
            self._note(self.closed > 0, "called when closed")
            self._note(not len(images), "called for nothing")
            self._note(images.dtype != np.float32 or not images.flags.c_contiguous, "called with others")
        assert self.may_go_on.wait(20)
        with self._lock:
            self._note(self.closed > 0, "closed under a call")
            self.running -= 1
        return np.repeat(images[:, 0, 0, :1], CLASSES, axis=1)

    def close(self) -> None:
        self._note(self.running > 0, "closed under a call")
        self.closed += 1

    def _note(self, is_wrong: bool, what: str) -> None:
        if is_wrong:
            self.wrong.append(what)


def _runner(bundle: Path, engine: Engine, scheme: str = "w8a8", largest: int = 4) -> dfq.Runner:
    manifest = open_bundle(bundle)
    options = dataclasses.replace(manifest.engine.options, batch=(1, 2, largest))
    facts = manifest.engine.model_copy(update={"options": options})
    return dfq.Runner(manifest.model_copy(update={"engine": facts, "scheme": scheme}), engine, None)


@pytest.fixture
def engine() -> Checking:
    return Checking()


@pytest.fixture
def runner(demo_bundle: Path, engine: Checking) -> Iterator[dfq.Runner]:
    with _runner(demo_bundle, engine) as opened:
        yield opened
    assert engine.wrong == []
    assert engine.closed == 1


def _numbered(count: int, first: int = 0) -> np.ndarray:
    """Images that say their number."""
    return np.broadcast_to(np.arange(first, first + count, dtype=np.float32)[:, None, None, None], (count, *SHAPE))


# --- pictures in ---


def test_pictures_of_all_kinds_at_once(runner: dfq.Runner, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "image.png")
    path = tmp_path / "image.png"
    found = runner.preprocess([image, path, str(path), path.read_bytes(), pixels])
    assert found.shape == (5, *SHAPE)
    for one in (image, path, str(path), path.read_bytes(), pixels):
        np.testing.assert_array_equal(runner.preprocess(one), found[:1])
    np.testing.assert_array_equal(runner.preprocess(np.stack([pixels, pixels])), found[:2])
    np.testing.assert_array_equal(found, np.broadcast_to(found[:1], found.shape))
    assert runner.preprocess([]).shape == (0, *SHAPE)


def test_a_bad_picture_among_several_is_named(runner: dfq.Runner, tmp_path: Path) -> None:
    good = Image.new("RGB", (9, 9))
    (tmp_path / "file.png").write_text("no picture")
    for bad, name in ((b"no picture", "images[1]"), (tmp_path / "file.png", f"`{tmp_path / 'file.png'}`")):
        with pytest.raises(ImagesError) as caught:
            runner.preprocess([good, bad])
        assert caught.value.what == f"{name} is not a whole image."
    with pytest.raises(ImagesError, match="too large"):
        runner.preprocess([good, good], most_pixels=80)


# --- arrays in, arrays out ---


def test_no_images_have_no_logits(runner: dfq.Runner, engine: Checking) -> None:
    found = runner(np.empty((0, *SHAPE), np.float32))
    assert (found.shape, found.dtype) == ((0, CLASSES), np.float32)
    assert engine.sizes == []


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, torch.float16, torch.float64], ids=str)
def test_floats_of_any_kind_are_taken(runner: dfq.Runner, kind: Any) -> None:
    images = torch.tensor(_numbered(3)).to(kind) if isinstance(kind, torch.dtype) else _numbered(3).astype(kind)
    np.testing.assert_array_equal(runner(images)[:, 0], [0, 1, 2])


def test_a_tensor_is_read_where_it_lies(demo_bundle: Path) -> None:
    seen: list[int] = []

    class Looking:
        def __call__(self, images: np.ndarray) -> np.ndarray:
            seen.append(images.ctypes.data)
            return np.zeros((len(images), CLASSES), np.float32)

        def close(self) -> None: ...

    tensor, array = torch.zeros(2, *SHAPE), np.zeros((2, *SHAPE), np.float32)
    with _runner(demo_bundle, Looking()) as runner:
        runner(tensor)
        runner(array)
    assert seen == [tensor.data_ptr(), array.ctypes.data]


def test_logits_can_be_had_by_dlpack(demo_bundle: Path) -> None:
    with dfq.load(demo_bundle) as runner:
        logits = runner(torch.zeros(2, *SHAPE))
        tensor = torch.from_dlpack(logits)
        assert (tensor.shape, tensor.dtype, tensor.data_ptr()) == ((2, CLASSES), torch.float32, logits.ctypes.data)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, *SHAPE), np.uint8),
        np.zeros((1, *SHAPE), np.int64),
        np.zeros((1, *SHAPE), object),
        torch.zeros(1, *SHAPE, requires_grad=True),
        torch.zeros(1, *SHAPE, dtype=torch.bfloat16),
        torch.zeros(1, *SHAPE, device="meta"),
        [[0.0]],
        None,
        Image.new("RGB", (32, 32)),
    ],
    ids=lambda images: f"{type(images).__name__} {getattr(images, 'dtype', '')}",
)
def test_what_is_not_model_ready_is_refused(runner: dfq.Runner, images: Any) -> None:
    for call in (runner, lambda images: runner.answer([images])):
        with pytest.raises(ImagesError) as caught:
            call(images)
        assert len(str(caught.value).splitlines()) == 3


# --- ragged requests ---


@pytest.mark.parametrize(
    ("counts", "calls"),
    [
        ([], []),
        ([0], []),
        ([0, 0], []),
        ([3], [3]),
        ([1, 2, 0, 1], [4]),
        ([2, 0, 9, 1], [4, 4, 4]),
        ([5, 5, 5], [4, 4, 4, 3]),
        ([0, 13, 0], [4, 4, 4, 1]),
    ],
    ids=str,
)
def test_requests_share_calls_and_get_their_own_answers(
    runner: dfq.Runner, engine: Checking, counts: list[int], calls: list[int]
) -> None:
    firsts = np.cumsum([0, *counts])
    answers = runner.answer([_numbered(count, first) for count, first in zip(counts, firsts, strict=False)])
    assert [answer.shape for answer in answers] == [(count, CLASSES) for count in counts]
    for answer, first, count in zip(answers, firsts, counts, strict=False):
        np.testing.assert_array_equal(answer[:, 0], np.arange(first, first + count))
    assert engine.sizes == calls


def test_requests_whose_scales_depend_on_company_have_none(demo_bundle: Path, engine: Checking) -> None:
    with _runner(demo_bundle, engine, "w8a8_dynamic") as runner:
        answers = runner.answer([_numbered(1), _numbered(0), _numbered(6, 1), _numbered(2, 7)])
    np.testing.assert_array_equal(np.concatenate(answers)[:, 0], np.arange(9))
    assert engine.sizes == [1, 4, 2, 2]


def test_one_bad_request_is_told_before_any_is_answered(runner: dfq.Runner, engine: Checking) -> None:
    with pytest.raises(ImagesError, match="do not fit"):
        runner.answer([_numbered(2), np.zeros((1, 3, 8, 8), np.float32)])
    assert engine.sizes == []


def test_the_engine_answers_ragged_requests_as_it_answers_each_alone(demo_bundle: Path) -> None:
    random = np.random.default_rng(0)
    requests = [random.normal(size=(count, *SHAPE)).astype(np.float32) for count in (3, 0, 40, 1)]
    with dfq.load(demo_bundle) as runner:
        for request, answer in zip(requests, runner.answer(requests), strict=True):
            np.testing.assert_allclose(answer, runner(request), atol=1e-5)


# --- threads ---


def test_threads_call_at_once_and_each_gets_its_own(runner: dfq.Runner, engine: Checking) -> None:
    def ask(number: int) -> None:
        images = _numbered(1 + number % 6, 100 * number)
        wanted = images[:, 0, 0, 0]
        np.testing.assert_array_equal(runner(images)[:, 0], wanted)
        for found, many in zip(runner.answer([images, images[:0], images]), (True, False, True), strict=True):
            np.testing.assert_array_equal(found[:, 0], wanted if many else [])

    engine.may_go_on.clear()
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, number) for number in range(400)]
        while engine.running < 16:
            pass
        engine.may_go_on.set()
        for one in asked:
            one.result()


def test_an_engine_of_onnx_runtime_serves_many_threads_from_picture_to_logits(demo_bundle: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (8, 40, 50, 3), np.uint8)
    with dfq.load(demo_bundle, threads=1) as runner:
        alone = [runner(runner.preprocess(picture)) for picture in pictures]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda number: runner(runner.preprocess(pictures[number % 8])), range(160)))
    for number, logits in enumerate(found):
        np.testing.assert_array_equal(logits, alone[number % 8])


# --- closing ---


@pytest.mark.parametrize(
    "call", [lambda runner, images: runner(images), lambda runner, images: runner.answer([images])]
)
def test_a_call_after_close_is_refused(
    demo_bundle: Path, engine: Checking, call: Callable[[dfq.Runner, np.ndarray], object]
) -> None:
    runner = _runner(demo_bundle, engine)
    runner.close()
    runner.close()
    for count in (0, 1):
        with pytest.raises(BackendError, match="the runner is closed"):
            call(runner, _numbered(count))
    with pytest.raises(BackendError, match="the runner is closed"):
        runner.warm_up()
    assert (engine.closed, engine.sizes, engine.wrong) == (1, [], [])


def test_close_waits_for_calls_that_run_and_refuses_later_ones(demo_bundle: Path, engine: Checking) -> None:
    runner = _runner(demo_bundle, engine)
    engine.may_go_on.clear()
    with ThreadPoolExecutor(5) as pool:
        calls = [pool.submit(runner, _numbered(1, first)) for first in range(3)]
        while engine.running < 3:
            pass
        closing = [pool.submit(runner.close) for _ in range(2)]
        while not runner._closed:
            pass
        with pytest.raises(BackendError, match="the runner is closed"):
            runner(_numbered(1))
        assert not any(close.done() for close in closing)
        assert engine.closed == 0
        engine.may_go_on.set()
        assert [call.result()[0, 0] for call in calls] == [0, 1, 2]
        for close in closing:
            close.result()
    assert (engine.closed, engine.wrong) == (1, [])


def test_a_call_that_fails_leaves_the_runner_as_it_was(demo_bundle: Path) -> None:
    class Failing:
        def __call__(self, images: np.ndarray) -> np.ndarray:
            raise BackendError(what="no", why="no", fix="no")

        def close(self) -> None: ...

    runner = _runner(demo_bundle, Failing())
    for _ in range(2):
        with pytest.raises(BackendError, match="no"):
            runner(_numbered(1))
    runner.close()  # or it would wait for ever


# --- warm-up, threads ---


@pytest.mark.parametrize(("asked", "sizes"), [((), [1, 1, 2, 2]), ((3,), [3, 3]), ((7, 1), [7, 7, 1, 1])])
def test_warming_up_runs_each_size_twice(
    runner: dfq.Runner, engine: Checking, asked: tuple[int, ...], sizes: list[int]
) -> None:
    runner.warm_up(*asked)
    assert engine.sizes == sizes


def test_onnx_runtime_computes_with_as_many_threads_as_asked_for(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    session = onnxruntime.InferenceSession

    def noted(path: str, options: onnxruntime.SessionOptions, **rest: Any) -> onnxruntime.InferenceSession:
        used.append(options.intra_op_num_threads)
        return session(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", noted)
    for threads in (None, 1, 2):
        dfq.load(demo_bundle, threads=threads).close()
    assert used == [0, 1, 2]


@pytest.mark.parametrize("backend", [trt, rtx])
def test_an_engine_on_a_gpu_takes_no_threads(backend: Any, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="a number of threads means nothing"):
        backend.load(tmp_path / "model.onnx", {}, BuildOptions(), threads=2)
