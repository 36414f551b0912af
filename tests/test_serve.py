"""`dfq-deploy serve`: Triton's own client works against it, limits hold, and no request is lost or answered twice."""

import base64
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

import dfq_deploy as dfq
from benchmarks.serving import Server, restarted, start
from calibrators.errors import BackendError
from dfq_deploy.cli import run
from dfq_deploy.serving.app import make_app
from dfq_deploy.serving.options import ServeOptions
from dfq_deploy.serving.server import _socket
from exporters.bundle import Manifest, open_bundle

_IMAGES = np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32)
_ONE = _IMAGES[:1].tobytes()
_RAW = {"Inference-Header-Content-Length": "0"}


@pytest.fixture(scope="module")
def server(demo_bundle: Path) -> Iterator[Server]:
    """The command, in a process of its own."""
    found = start(demo_bundle, "--max-pixels", "10000")
    yield found
    found.stop()


@pytest.fixture(scope="module")
def logits(demo_bundle: Path) -> np.ndarray:
    with dfq.load(demo_bundle) as runner:
        return runner(_IMAGES)


@pytest.fixture
def client(server: Server) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(f"127.0.0.1:{server.port}") as found:
        yield found


def _tensor(images: np.ndarray = _IMAGES, *, binary: bool = True) -> list[InferInput]:
    found = InferInput("images", images.shape, "FP32")
    found.set_data_from_numpy(images, binary_data=binary)
    return [found]


def _files(*files: bytes) -> list[InferInput]:
    found = InferInput("encoded", [len(files), 1], "BYTES")
    found.set_data_from_numpy(np.array([[file] for file in files], object))
    return [found]


def _file(image: Image.Image, kind: str = "png") -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _picture(width: int = 50, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), np.uint8))


def _ask(
    port: int, body: bytes, headers: dict[str, str], *, path: str = "/v2/models/m/infer", method: str = "POST"
) -> tuple[int, dict[str, str], bytes]:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        link.request(method, path, body, headers)
        answer = link.getresponse()
        return answer.status, dict(answer.headers), answer.read()
    finally:
        link.close()


def test_a_connection_sends_at_once() -> None:
    with _socket("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        taken, _ = listener.accept()
        with taken:
            assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_tritons_client_finds_what_is_there(client: InferenceServerClient) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("m") and client.is_model_ready("m_encoded", "1")
    assert not client.is_model_ready("n") and not client.is_model_ready("m", "2")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data", "classification"]
    told = client.get_model_metadata("m")
    assert told["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 32, 32]}]
    assert told["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}]
    assert client.get_model_metadata("m_encoded")["inputs"] == [
        {"name": "encoded", "datatype": "BYTES", "shape": [-1, 1]}
    ]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_tritons_client_gets_its_logits(
    client: InferenceServerClient, logits: np.ndarray, binary_in: bool, binary_out: bool | None
) -> None:
    outputs = None if binary_out is None else [InferRequestedOutput("logits", binary_data=binary_out)]
    answer = client.infer("m", _tensor(binary=binary_in), outputs=outputs, request_id="q 1")
    np.testing.assert_array_equal(answer.as_numpy("logits"), logits)
    assert answer.get_response()["id"] == "q 1"


@pytest.mark.parametrize("method", ["gzip", "deflate"])
def test_tritons_client_may_compress(client: InferenceServerClient, logits: np.ndarray, method: str) -> None:
    answer = client.infer("m", _tensor(), request_compression_algorithm=method, response_compression_algorithm=method)
    np.testing.assert_array_equal(answer.as_numpy("logits"), logits)


def test_tritons_client_gets_classes(client: InferenceServerClient, logits: np.ndarray, demo_bundle: Path) -> None:
    answer = client.infer("m", _tensor(), outputs=[InferRequestedOutput("logits", class_count=1)])
    classes = (demo_bundle / "classes.txt").read_text().splitlines()
    wanted = [f"{row.max():f}:{row.argmax()}:{classes[row.argmax()]}".encode() for row in logits]
    assert answer.as_numpy("logits").ravel().tolist() == wanted


def test_tritons_client_may_ask_for_many_things_at_once(server: Server, logits: np.ndarray) -> None:
    with InferenceServerClient(f"127.0.0.1:{server.port}", concurrency=8) as client:
        asked = [client.async_infer("m", _tensor(_IMAGES[n % 5 : n % 5 + 1])) for n in range(24)]
        for n, one in enumerate(asked):
            np.testing.assert_array_equal(one.get_result().as_numpy("logits"), logits[n % 5 : n % 5 + 1])


def test_image_files_are_taken_as_they_are(client: InferenceServerClient, server: Server, demo_bundle: Path) -> None:
    pictures = [_picture(), _picture(33).convert("L"), _picture(90).convert("RGBA")]
    files = [_file(picture) for picture in pictures]
    with dfq.load(demo_bundle) as runner:
        wanted = runner(runner.preprocess(pictures))
    np.testing.assert_array_equal(client.infer("m_encoded", _files(*files)).as_numpy("logits"), wanted)
    tensor = {"name": "encoded", "datatype": "BYTES", "shape": [3, 1]}
    body = {"inputs": [{**tensor, "data": [base64.b64encode(file).decode() for file in files]}]}
    _, _, text = _ask(server.port, json.dumps(body).encode(), {}, path="/v2/models/m_encoded/infer")
    np.testing.assert_allclose(json.loads(text)["outputs"][0]["data"], wanted.ravel(), rtol=1e-6)
    status, headers, raw = _ask(server.port, files[0], _RAW, path="/v2/models/m_encoded/infer")
    assert status == 200
    body_at = int(headers["inference-header-content-length"])
    np.testing.assert_array_equal(np.frombuffer(raw[body_at:], np.float32), wanted[0])


@pytest.mark.parametrize(
    ("files", "status", "match"),
    [
        ([_file(_picture()), _file(_picture(), "jpeg")[:-300]], "400", "image 1 cannot be decoded"),
        ([b""], "400", "image 0 cannot be decoded"),
        ([_file(_picture(), "gif")], "400", "send JPEG or PNG"),
        ([_file(_picture(101, 100))], "413", "image 0 is too large.*101 x 100 pixels, and 10000 are the limit"),
        ([_file(Image.new("1", (20_000, 20_000)))], "413", "image 0 is too large.*10000 are the limit"),
        ([_file(Image.new("L", (1, 10)))], "413", "image 0, resized for the model, is too large.*32 x 320 pixels"),
    ],
    ids=["truncated", "empty", "another format", "too large", "far too large", "narrow"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_files_that_cannot_be_decoded_are_told(
    client: InferenceServerClient, files: list[bytes], status: str, match: str
) -> None:
    with pytest.raises(InferenceServerException, match=match) as caught:
        client.infer("m_encoded", _files(*files))
    assert caught.value.status() == status
    assert client.is_server_ready()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("PUT", "/v2", 405),
        ("POST", "/v2/models/n/infer", 404),
        ("POST", "/v2/models/m/infer", 400),
    ],
)
def test_every_error_is_json(server: Server, method: str, path: str, status: int) -> None:
    found, headers, body = _ask(server.port, b"?" * 10**6 if status == 404 else b"?", {}, method=method, path=path)
    assert (found, headers["content-type"]) == (status, "application/json")
    assert json.loads(body)["error"] and b"Traceback" not in body


@pytest.mark.parametrize("chunked", [True, False])
def test_a_request_that_is_too_large_is_refused_and_the_next_one_is_not(server: Server, chunked: bool) -> None:
    body = bytes(2 * 10**6)  # 32 images of the demo are 393,216 bytes, and a MiB more is allowed
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    link.request("POST", "/v2/models/m/infer", iter([body]) if chunked else body, _RAW, encode_chunked=chunked)
    answer = link.getresponse()
    assert answer.status == 413
    assert "too large; 1441792 bytes are allowed" in json.loads(answer.read())["error"]
    link.close()
    assert _ask(server.port, _ONE, _RAW)[0] == 200


def test_prometheus_reads_what_was_counted(server: Server) -> None:
    def count() -> dict[str, float]:
        text = _ask(server.port, b"", {}, method="GET", path="/metrics")[2].decode()
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    answered, refused = (f'dfq_requests_total{{model="m",status="{status}"}}' for status in (200, 400))
    before = count()
    assert _ask(server.port, _IMAGES.tobytes(), _RAW)[0] == 200
    assert _ask(server.port, b"?", {})[0] == 400
    after = count()
    assert after["dfq_images_total"] - before["dfq_images_total"] == 5
    assert after["dfq_batch_images_sum"] - before["dfq_batch_images_sum"] == 5
    assert after[answered] - before.get(answered, 0) == 1
    assert after[refused] - before.get(refused, 0) == 1
    assert after["dfq_inside"] == 0


def test_the_interface_is_described(server: Server) -> None:
    paths = json.loads(_ask(server.port, b"", {}, method="GET", path="/openapi.json")[2])["paths"]
    assert {"/v2/health/live", "/v2/models/{name}/infer", "/metrics"} <= set(paths)


class _Runner:
    """A runner whose engine waits at a gate, and does what it is told."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest, self.classes = manifest, None
        self.gate = threading.Event()
        self.error: Exception | None = None
        self.gate.set()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        return images.reshape(len(images), -1)[:, :10]


@contextmanager
def _served(runner: _Runner, **options: Any) -> Iterator[tuple[int, uvicorn.Server]]:
    """An application in a thread: its port, and what stops it."""
    app, _ = make_app(runner, ServeOptions(name="m", **options))  # type: ignore[arg-type]
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            port = listener.getsockname()[1]
            assert _ask(port, b"", {}, method="GET", path="/v2/health/ready")[0] == 200
            yield port, server
        finally:
            runner.gate.set()
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture
def runner(demo_bundle: Path) -> _Runner:
    return _Runner(open_bundle(demo_bundle))


class _Asking(threading.Thread):
    """A request on its way; `answer` is there once it is joined."""

    def __init__(self, port: int, body: bytes = _ONE) -> None:
        super().__init__()
        self._port, self._body = port, body
        self.answer: tuple[int, dict[str, str], bytes] = (0, {}, b"")
        self.start()

    def run(self) -> None:
        self.answer = _ask(self._port, self._body, _RAW)


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _inside(port: int) -> float:
    text = _ask(port, b"", {}, method="GET", path="/metrics")[2].decode()
    return float(re.search(r"^dfq_inside (.*)$", text, re.MULTILINE)[1])  # type: ignore[index]


def _listens(port: int) -> bool:
    try:
        _ask(port, b"", {}, method="GET", path="/v2/health/live")
    except ConnectionError:
        return False
    return True


def test_a_full_house_says_when_to_come_again(runner: _Runner) -> None:
    with _served(runner, queue=2) as (port, _):
        runner.gate.clear()
        inside = [_Asking(port) for _ in range(2)]
        _until(lambda: _inside(port) == 2)
        status, headers, body = _ask(port, _ONE, _RAW)
        assert (status, int(headers["retry-after"]) >= 1) == (503, True)
        assert "no room" in json.loads(body)["error"]
        runner.gate.set()
        for one in inside:
            one.join()
            assert one.answer[0] == 200


def test_stopping_finishes_what_was_taken_and_refuses_the_rest(runner: _Runner) -> None:
    with _served(runner) as (port, server):
        runner.gate.clear()
        inside = [_Asking(port, _IMAGES[n : n + 1].tobytes()) for n in range(5)]
        _until(lambda: _inside(port) == 5)
        server.should_exit = True
        _until(lambda: not _listens(port))
        assert all(one.is_alive() for one in inside)
        runner.gate.set()
        for n, one in enumerate(inside):
            one.join()
            status, headers, body = one.answer
            assert status == 200
            got = np.frombuffer(body[int(headers["inference-header-content-length"]) :], np.float32)
            np.testing.assert_array_equal(got, _IMAGES[n].ravel()[:10])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (BackendError(what="the GPU is gone.", why="it fell off the bus.", fix="start again."), "the GPU is gone"),
        (ValueError("secret"), "the server failed; its log says how."),
    ],
)
def test_an_engine_that_fails_is_told_and_the_server_goes_on(runner: _Runner, error: Exception, told: str) -> None:
    with _served(runner) as (port, _):
        runner.error = error
        status, headers, body = _ask(port, _ONE, _RAW)
        assert (status, headers["content-type"]) == (500, "application/json")
        assert told in json.loads(body)["error"] and b"secret" not in body
        runner.error = None
        assert _ask(port, _ONE, _RAW)[0] == 200


def test_a_request_that_does_not_arrive_gives_its_place_back(runner: _Runner) -> None:
    with _served(runner, queue=1, read_s=0.3) as (port, _), socket.create_connection(("127.0.0.1", port), 20) as slow:
        slow.sendall(b"POST /v2/models/m/infer HTTP/1.1\r\nHost: m\r\nContent-Length: 100\r\n\r\n{")
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        assert _ask(port, _ONE, _RAW)[0] == 200


def test_a_client_that_goes_away_gives_its_place_back(runner: _Runner) -> None:
    with _served(runner, queue=1) as (port, _):
        with socket.create_connection(("127.0.0.1", port), 20) as gone:
            gone.sendall(b"POST /v2/models/m/infer HTTP/1.1\r\nHost: m\r\nContent-Length: 100\r\n\r\n{")
            _until(lambda: _inside(port) == 1)
        _until(lambda: _inside(port) == 0)
        assert _ask(port, _ONE, _RAW)[0] == 200


def test_no_request_is_lost_or_answered_twice_under_overload_and_restart(demo_bundle: Path) -> None:
    found = restarted(demo_bundle, clients=10, seconds=4, restarts=1, flags=("--queue", "2"))
    statuses = found["statuses"]
    assert set(statuses) == {"200", "503", "cut"}, "it was not full, or not stopped while requests came"
    assert found["wrong"] == 0
    assert found["servers_answered"] == statuses["200"], "an answer was lost, or came twice"
    assert found["servers_refused"] == statuses["503"]


def test_a_signal_that_comes_before_the_first_request_stops_it_as_well(demo_bundle: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    tally = dfq.serve(demo_bundle, dfq.ServeOptions(port=0), listening=lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert (tally.answered, tally.refused) == (0, 0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_engine_that_cannot_run_is_told_before_anybody_asks(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: object, images: np.ndarray) -> np.ndarray:
        raise BackendError(what="the GPU is gone.", why="it fell off the bus.", fix="start again.")

    monkeypatch.setattr(dfq.Runner, "__call__", fail)
    assert run(["serve", str(demo_bundle), "--port", "0"]) == 3
    assert capsys.readouterr() == ("", "error: the GPU is gone.\n  why: it fell off the bus.\n  fix: start again.\n")


def test_the_server_needs_no_torch(demo_bundle: Path) -> None:
    script = """
import sys, threading, urllib.request
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "timm", "torchvision", "scipy", "onnxscript", "onnxsim", "matplotlib"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
import dfq_deploy as dfq
import os, signal

def listening(address, models):
    def ask():
        print(urllib.request.urlopen(address + "/v2/models/" + models[0]).status)
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=ask).start()

print(dfq.serve(sys.argv[1], dfq.ServeOptions(port=0), listening=listening))
"""
    done = subprocess.run([sys.executable, "-c", script, str(demo_bundle)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["200", "Tally(answered=0, refused=0)"]


def test_without_the_extra_the_command_says_what_to_install(demo_bundle: Path) -> None:
    script = """
import sys
for name in ("fastapi", "uvicorn", "prometheus_client"):
    sys.modules[name] = None
from dfq_deploy.cli import run
assert run(["--help"]) == run(["serve", "--help"]) == 0
sys.exit(run(["serve", sys.argv[1]]))
"""
    done = subprocess.run([sys.executable, "-c", script, str(demo_bundle)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert re.fullmatch(
        r"error: `serve` needs the package `\w+`, which is not installed\.\n"
        r"  why: serving an engine takes more than running one\.\n"
        r"  fix: pip install 'dfq-deploy\[serve\]'\.\n",
        done.stderr,
    )


def test_an_address_that_is_taken_is_told(
    demo_bundle: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["serve", str(demo_bundle), "--port", str(server.port)]) == 3
    assert f"cannot listen on 127.0.0.1, port {server.port}" in capsys.readouterr().err
