"""The run-time half of the TensorRT backends, as far as it goes without a GPU: refusals, the log, and arithmetic."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_engine import build_tiny

from calibrators.errors import BackendError, NotHereError
from exporters.tensorrt import cuda, loading
from exporters.tensorrt.engine import TensorRTEngine, chunks
from exporters.tensorrt.jit import keep_kernels
from exporters.tensorrt.log import Recorder, recorder

BATCH = (1, 4, 8)

without_gpu = pytest.mark.skipif(cuda.device() is not None, reason="there is a GPU here")


@pytest.fixture(scope="module")
def rtx() -> ModuleType:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")


@pytest.fixture(scope="module")
def built(rtx: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder]:
    return build_tiny(rtx, tmp_path_factory.mktemp("tiny"), BATCH, target="SM89")


@given(n=st.integers(0, 300), sizes=st.tuples(*[st.integers(1, 40)] * 3))
def test_chunks_hold_every_image_once_and_fit_the_profile(n: int, sizes: tuple[int, int, int]) -> None:
    smallest, best, largest = sorted(sizes)
    found = chunks(n, (smallest, best, largest))
    assert [i for start, stop, _ in found for i in range(start, stop)] == list(range(n))
    assert all(smallest <= size <= largest for *_, size in found)
    assert all(size == max(smallest, stop - start) for start, stop, size in found)
    assert len(found) == -(-n // largest), "as few as can be"


def test_no_images_are_no_chunks() -> None:
    assert chunks(0, BATCH) == []


@without_gpu
def test_without_a_driver_there_is_no_device() -> None:
    pytest.importorskip("cuda.bindings.runtime")
    assert cuda.device() is None
    with pytest.raises(BackendError) as caught:
        cuda.require()
    assert str(caught.value) == (
        "there is no NVIDIA GPU that can be used here.\n"
        "  why: no NVIDIA driver is installed.\n"
        "  fix: run this on a machine with an NVIDIA GPU and its driver."
    )


@without_gpu
@pytest.mark.parametrize("failing", ["cudaDriverGetVersion", "cudaGetDeviceProperties"])
def test_a_driver_without_a_gpu_is_no_gpu(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    monkeypatch.setattr(cuda.runtime, "cudaDriverGetVersion", lambda: (0, 13000))
    monkeypatch.setattr(cuda.runtime, failing, lambda *_: (runtime.cudaError_t.cudaErrorNoDevice, None))
    with pytest.raises(NotHereError, match="no NVIDIA GPU that can be used") as caught:
        cuda.require()
    assert "cudaErrorNoDevice" in caught.value.why
    assert "CUDA_VISIBLE_DEVICES" in caught.value.fix


@pytest.mark.parametrize("take", [cuda.Stream, lambda: cuda.DeviceBuffer(8), lambda: cuda.HostBuffer((2, 2))])
def test_what_cuda_refuses_is_said_in_three_lines(take: type) -> None:
    pytest.importorskip("cuda.bindings.runtime")
    with pytest.raises(BackendError) as caught:
        take()
    assert caught.value.what == "CUDA failed with cudaErrorInsufficientDriver."
    assert caught.value.why == "CUDA driver version is insufficient for CUDA runtime version."
    assert "driver" in caught.value.fix


def test_check_gives_what_a_call_gave() -> None:
    assert cuda.check((0,)) is None
    assert cuda.check((0, 7)) == 7
    assert cuda.check((0, 7, 8)) == (7, 8)


def test_without_cuda_bindings_there_is_no_device_and_the_reason_names_the_package() -> None:
    program = (
        "import sys\n"
        "sys.modules['cuda.bindings'] = None\n"
        "from exporters.tensorrt import cuda, engine\n"
        "assert cuda.device() is None\n"
        "assert not {'torch', 'tensorrt', 'tensorrt_rtx'} & set(sys.modules)\n"
        "try:\n"
        "    cuda.require()\n"
        "except cuda.BackendError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "`cuda-bindings` is not installed" in done.stdout
    assert "pip install cuda-bindings" in done.stdout


@without_gpu
def test_an_engine_is_refused_in_three_lines_where_there_is_no_gpu(
    rtx: ModuleType, built: tuple[Path, Recorder]
) -> None:
    pytest.importorskip("cuda.bindings.runtime")
    with pytest.raises(BackendError) as caught:
        TensorRTEngine(rtx, built[0], BATCH)
    assert caught.value.what == "there is no NVIDIA GPU that can be used here."
    assert caught.value.why == "no NVIDIA driver is installed."


@without_gpu
def test_tensorrt_itself_says_that_the_driver_is_missing(rtx: ModuleType, built: tuple[Path, Recorder]) -> None:
    with pytest.raises(BackendError) as caught:
        loading.deserialize(rtx, built[0], recorder(rtx))
    assert str(built[0]) in caught.value.what
    assert rtx.__version__ in caught.value.what
    assert "cudaError 35" in caught.value.why
    assert "driver" in caught.value.fix


@pytest.mark.parametrize("content", [b"", b"not an engine " * 100])
def test_what_is_no_engine_is_refused_with_the_command_that_builds_it(
    rtx: ModuleType, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "model.engine"
    path.write_bytes(content)
    with pytest.raises(BackendError) as caught:
        loading.deserialize(rtx, path, recorder(rtx))
    assert caught.value.why == "it is not an engine, or is cut off."
    assert caught.value.fix.endswith(f"dfq-deploy build {tmp_path}")


def test_a_missing_engine_is_refused_with_the_command_that_builds_it(rtx: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(BackendError) as caught:
        loading.deserialize(rtx, tmp_path / "model.engine", recorder(rtx))
    assert caught.value.why == "No such file or directory."
    assert caught.value.fix.endswith(f"dfq-deploy build {tmp_path}")


def test_every_reason_that_rtx_may_give_against_an_engine_has_words(rtx: ModuleType) -> None:
    assert set(rtx.EngineInvalidityDiagnostics.__members__) == set(loading._REASONS)


def test_the_log_keeps_the_layer_table_and_little_else_of_a_build(built: tuple[Path, Recorder]) -> None:
    verbose = [text for severity, text in built[1].messages if severity == "VERBOSE"]
    assert len([text for text in verbose if text.startswith("Layers:")]) == 1
    assert all("Layers:" in text for text in verbose)
    assert built[1].errors() == []


def test_the_log_keeps_errors_warnings_and_the_prefixes_that_are_asked_for(rtx: ModuleType) -> None:
    log = recorder(rtx, verbose=("Wanted",))
    for severity in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"):
        log.log(getattr(rtx.ILogger, severity), f"of {severity}")
    log.log(rtx.ILogger.VERBOSE, "Wanted: this")
    assert [severity for severity, _ in log.messages] == ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"]
    assert log.messages[-1] == ("VERBOSE", "Wanted: this")
    assert log.errors() == ["of INTERNAL_ERROR", "of ERROR"]
    log.clear()
    assert log.messages == []


def test_the_log_hears_what_the_parser_does_not_take(rtx: ModuleType) -> None:
    log = recorder(rtx)
    builder = rtx.Builder(log)
    network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert not rtx.OnnxParser(network, log).parse(b"not ONNX")
    assert log.errors()


def test_kernels_are_kept_where_they_can_be(tmp_path: Path) -> None:
    keep_kernels(b"kernels", tmp_path / "kept")
    keep_kernels(b"more kernels", tmp_path / "kept")
    assert (tmp_path / "kept").read_bytes() == b"more kernels"
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="cannot be kept in .*: (Not a directory|File exists)"):
        keep_kernels(b"kernels", tmp_path / "file" / "kept")
