"""A loaded engine, of either TensorRT: what it answers, from where it reads, and what it refuses."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tiny_engine import CLASSES, IMAGE, build_tiny, tiny_images, tiny_logits

from calibrators.errors import BackendError
from exporters.tensorrt import cuda
from exporters.tensorrt.engine import TensorRTEngine

pytestmark = pytest.mark.gpu

BATCH = (1, 4, 8)


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt_rtx"])
def trt(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = pytest.importorskip(
        request.param, reason=f"{request.param} is not installed", exc_type=ImportError
    )
    here = cuda.require().capability.upper()
    if hasattr(module, "ComputeCapability") and here not in module.ComputeCapability.__members__:
        pytest.skip(f"{request.param} {module.__version__} does not run on {here}")
    return module


@pytest.fixture(scope="module")
def built(trt: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(trt, tmp_path_factory.mktemp("tiny"), BATCH)[0]


@pytest.fixture
def engine(trt: ModuleType, built: Path) -> Iterator[TensorRTEngine]:
    loaded = TensorRTEngine(trt, built, BATCH)
    yield loaded
    loaded.close()


def _captures_itself(trt: ModuleType) -> bool:
    return hasattr(trt, "CudaGraphStrategy")


def _assert_right(logits: np.ndarray, images: np.ndarray) -> None:
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, tiny_logits(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [0, 1, 3, BATCH[2], BATCH[2] + 1, 3 * BATCH[2] + 2])
def test_any_number_of_images_is_answered(engine: TensorRTEngine, n: int) -> None:
    images = tiny_images(n)
    for _ in range(3):  # the first has no graph, the second captures it, the third only launches it
        logits = engine(images)
        assert logits.shape == (n, CLASSES)
        _assert_right(logits, images)


def test_fewer_images_than_the_smallest_batch_are_answered(trt: ModuleType, tmp_path: Path) -> None:
    path, _ = build_tiny(trt, tmp_path, (4, 4, 8))
    engine = TensorRTEngine(trt, path, (4, 4, 8))
    for n in (1, 3, 9):
        _assert_right(engine(tiny_images(n)), tiny_images(n))
    engine.close()


def test_a_graph_gives_what_plain_launches_give(trt: ModuleType, engine: TensorRTEngine) -> None:
    images, others = tiny_images(3), -tiny_images(3)
    plain = engine(images)
    assert engine.graphs == ()
    replayed = engine(images)
    assert engine.graphs == (() if _captures_itself(trt) else (3,))
    np.testing.assert_allclose(replayed, plain, rtol=1e-5, atol=1e-5)
    _assert_right(engine(others), others)


def test_graphs_of_other_sizes_do_not_disturb_each_other_and_are_eight_at_most(trt: ModuleType, tmp_path: Path) -> None:
    path, _ = build_tiny(trt, tmp_path, (1, 4, 10))
    engine = TensorRTEngine(trt, path, (1, 4, 10))
    for _ in range(2):
        for n in (*range(1, 11), *range(10, 0, -1)):
            for _ in range(2):
                _assert_right(engine(tiny_images(n)), tiny_images(n))
    assert len(engine.graphs) == (0 if _captures_itself(trt) else 8)
    engine.close()


def test_images_on_the_gpu_give_what_the_same_images_in_main_memory_give(engine: TensorRTEngine) -> None:
    torch = pytest.importorskip("torch")
    for n in (0, 1, 3, 8, 9, 20):
        images = tiny_images(n)
        on_gpu = torch.from_numpy(images).to("cuda:0")
        for _ in range(2):
            np.testing.assert_allclose(engine(on_gpu), engine(images), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(on_gpu.cpu().numpy(), images, err_msg="the engine wrote to its input")
    images = tiny_images(5)
    part = torch.from_numpy(images).to("cuda:0")[1:4]  # 192 bytes on: no address that TensorRT reads from
    _assert_right(engine(part), images[1:4])


def test_images_that_are_still_being_written_are_waited_for(engine: TensorRTEngine) -> None:
    torch = pytest.importorskip("torch")
    images = tiny_images(4)
    ready, late = torch.from_numpy(images).to("cuda:0"), torch.zeros((4, *IMAGE), device="cuda:0")
    busy = torch.ones((4096, 4096), device="cuda:0")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(50):
            busy = busy @ busy
        late.copy_(ready)
        _assert_right(engine(late), images)


def test_images_that_do_not_fit_are_refused(engine: TensorRTEngine) -> None:
    torch = pytest.importorskip("torch")
    images = tiny_images(4)
    wrong = [
        images.astype(np.float64),
        images[0],
        images[:, :2],
        torch.from_numpy(images),
        torch.from_numpy(images).to("cuda:0").half(),
        torch.from_numpy(images).to("cuda:0").transpose(2, 3),
    ]
    for other in wrong:
        with pytest.raises(BackendError):
            engine(other)
    _assert_right(engine(images), images)


def test_threads_get_their_own_answers(engine: TensorRTEngine) -> None:
    requests = [tiny_images(n) for n in (1, 2, 3, 9) * 8]
    with ThreadPoolExecutor(4) as pool:
        for images, logits in zip(requests, pool.map(engine, requests), strict=True):
            _assert_right(logits, images)


def test_a_closed_engine_refuses(engine: TensorRTEngine) -> None:
    engine(tiny_images(1))
    engine.close()
    engine.close()
    with pytest.raises(BackendError, match="closed"):
        engine(tiny_images(1))


def test_an_engine_that_is_cut_off_is_refused(trt: ModuleType, built: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    path.write_bytes(built.read_bytes()[:-1000])
    with pytest.raises(BackendError) as caught:
        TensorRTEngine(trt, path, BATCH)
    assert f"dfq-deploy build {tmp_path}" in caught.value.fix


def test_an_engine_of_another_version_is_refused(trt: ModuleType, built: Path, tmp_path: Path) -> None:
    data = bytearray(built.read_bytes())
    at = data[:64].find(bytes(int(part) for part in trt.__version__.split(".")[:3]))
    if at < 0:
        pytest.skip("where this TensorRT writes its version in an engine is not known")
    data[at] += 1
    path = tmp_path / "model.engine"
    path.write_bytes(data)
    with pytest.raises(BackendError) as caught:
        TensorRTEngine(trt, path, BATCH)
    assert f"dfq-deploy build {tmp_path}" in caught.value.fix


def test_an_engine_for_another_gpu_is_refused(trt: ModuleType, tmp_path: Path) -> None:
    if not hasattr(trt, "ComputeCapability") or int(cuda.require().capability.removeprefix("sm")) >= 120:
        pytest.skip("only TensorRT for RTX builds for another GPU, and only for a newer one that does not fit")
    path, _ = build_tiny(trt, tmp_path, BATCH, target="SM120")
    with pytest.raises(BackendError) as caught:
        TensorRTEngine(trt, path, BATCH)
    assert caught.value.why == "it was built for other GPUs than the one here."
    assert f"dfq-deploy build {tmp_path}" in caught.value.fix


def test_an_engine_for_other_batches_is_refused(trt: ModuleType, built: Path) -> None:
    with pytest.raises(BackendError) as caught:
        TensorRTEngine(trt, built, (1, 8, 32))
    assert f"dfq-deploy build {built.parent}" in caught.value.fix


def test_rtx_keeps_its_kernels_from_one_load_to_the_next(trt: ModuleType, built: Path, tmp_path: Path) -> None:
    cache = tmp_path / "kernels"
    for _ in range(2):
        engine = TensorRTEngine(trt, built, BATCH, cache=cache)
        _assert_right(engine(tiny_images(3)), tiny_images(3))
        engine.close()
        assert cache.is_file() == _captures_itself(trt)
    cache.write_bytes(b"of something else")
    engine = TensorRTEngine(trt, built, BATCH, cache=cache)
    _assert_right(engine(tiny_images(3)), tiny_images(3))
    engine.close()
