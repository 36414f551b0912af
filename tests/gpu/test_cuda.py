"""CUDA itself: the GPU, buffers, copies, and graphs of copies."""

import numpy as np
import pytest

from exporters.tensorrt import cuda

pytestmark = pytest.mark.gpu


def test_the_gpu_is_described() -> None:
    found = cuda.require()
    assert found == cuda.device()
    assert found.name
    assert found.capability.startswith("sm")
    assert int(found.capability.removeprefix("sm")) >= 50
    assert found.memory > 2**28


def test_copies_go_to_the_gpu_and_back() -> None:
    sent_values = np.arange(6).reshape(2, 3)
    with (
        cuda.first_gpu(),
        cuda.Stream() as stream,
        cuda.DeviceBuffer(24) as buffer,
        cuda.HostBuffer((2, 3)) as sent,
        cuda.HostBuffer((2, 3)) as received,
    ):
        sent.array[:], received.array[:] = sent_values, 0
        stream.copy(buffer.handle, sent.handle, 24)
        stream.copy(received.handle, buffer.handle, 24)
        stream.synchronize()
        np.testing.assert_array_equal(received.array, sent_values)


def test_a_graph_does_its_work_when_it_is_launched_and_not_before() -> None:
    with cuda.first_gpu(), cuda.Stream() as stream, cuda.HostBuffer((4,)) as sent, cuda.HostBuffer((4,)) as received:
        sent.array[:], received.array[:] = 1, 0
        graph = stream.capture(lambda: stream.copy(received.handle, sent.handle, 16))
        assert graph is not None
        stream.synchronize()
        assert not received.array.any()
        for value in (2, 3):
            sent.array[:] = value
            graph.launch(stream)
            stream.synchronize()
            assert (received.array == value).all()
        graph.close()


def test_work_that_cannot_be_captured_gives_no_graph_and_leaves_the_stream_usable() -> None:
    with cuda.first_gpu(), cuda.Stream() as stream, cuda.HostBuffer((4,)) as sent, cuda.HostBuffer((4,)) as received:
        assert stream.capture(stream.synchronize) is None
        sent.array[:], received.array[:] = 5, 0
        stream.copy(received.handle, sent.handle, 16)
        stream.synchronize()
        assert (received.array == 5).all()


def test_closing_twice_does_no_harm() -> None:
    with cuda.first_gpu():
        for owned in (cuda.Stream(), cuda.DeviceBuffer(8), cuda.HostBuffer((2,))):
            owned.close()
            owned.close()
