"""How many requests a server answers, and how fast: `make bench-serving`. Loopback; needs no download.

DeiT-T in w8a8 with random weights, one image in a request. Clients are threads of this process: each sends its next
request when the last is answered. Every answer is held against the logits of its own image, so the figures are of
right answers. Then a crowd that does not fit meets a server that is stopped and started again: what the servers say
they answered must be what the clients got, no more and no less.
"""

import argparse
import contextlib
import http.client
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import dfq_deploy as dfq

CLIENTS = (1, 4, 16)
IMAGES = 32
MODES = {"off": ["--no-gather"], "on": []}
SLICES = 6


@dataclass
class Crowd:
    """Clients that send one image at a time, over and over.

    Attributes:
        images: What they send, (N, C, H, W).
        logits: What they must get, (N, classes).
        statuses: How often which status came; `cut` where the connection ended first.
        seconds: How long each answer with logits took.
        wrong: Answers that were not those of their image.
    """

    images: np.ndarray
    logits: np.ndarray
    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    wrong: int = 0

    def __post_init__(self) -> None:
        gaps = np.abs(self.logits[:, None] - self.logits[None]).max(-1)
        self._near = gaps[~np.eye(len(gaps), dtype=bool)].min() / 10  # so near is no other image's
        assert self._near > 0, "images whose logits are alike would not tell a mix-up"
        self._lock = threading.Lock()

    def run(self, port: int, *, clients: int, seconds: float, during: Iterator[None] | None = None) -> float:
        """Send for `seconds`; steps of `during` are spread over them. Returns how long it took."""
        start, end = time.perf_counter(), time.perf_counter() + seconds
        threads = [threading.Thread(target=self._send, args=(port, which, end)) for which in range(clients)]
        for thread in threads:
            thread.start()
        for _ in during or ():
            pass
        for thread in threads:
            thread.join()
        return time.perf_counter() - start

    def _send(self, port: int, which: int, end: float) -> None:
        at, link = which, http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        headers = {"Inference-Header-Content-Length": "0"}
        while time.perf_counter() < end:
            at = (at + 1) % len(self.images)
            start = time.perf_counter()
            try:
                link.request("POST", "/v2/models/m/infer", self.images[at].tobytes(), headers)
                response = link.getresponse()
                body = response.read()
            except (OSError, http.client.HTTPException):
                self._count("cut")
                link.close()
                time.sleep(0.05)
                continue
            taken = time.perf_counter() - start
            if response.status == 200:
                right = self._right(at, body, int(response.headers["Inference-Header-Content-Length"]))
                self._count("200", taken=taken, wrong=not right)
                continue
            self._count(str(response.status))
            if response.status == 503:
                assert int(response.headers["Retry-After"]) >= 1
                time.sleep(0.01)  # sooner than it was told to
        link.close()

    def _count(self, status: str, *, taken: float | None = None, wrong: bool = False) -> None:
        with self._lock:
            self.statuses[status] += 1
            self.wrong += wrong
            if taken is not None:
                self.seconds.append(taken)

    def _right(self, at: int, body: bytes, header: int) -> bool:
        got = np.frombuffer(body[header:], np.float32)
        return got.shape == self.logits[at].shape and bool(np.abs(got - self.logits[at]).max() < self._near)


@dataclass(frozen=True)
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    port: int

    def stop(self) -> tuple[int, int]:
        """Stop it as a supervisor does; returns how many requests it says it answered and refused."""
        self.process.terminate()
        out, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, out
        told = re.search(r"stopped: (\d+) requests? answered, (\d+) refused", out)
        assert told is not None, out
        return int(told[1]), int(told[2])


def start(bundle: Path, *flags: str, port: int = 0, name: str = "m") -> Server:
    """A server of `bundle`, when it answers."""
    command = [sys.executable, "-m", "dfq_deploy", "serve", str(bundle), "--name", name, "--port", str(port), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    told = re.search(r"http://127\.0\.0\.1:(\d+)", line)
    assert told is not None, line
    link = http.client.HTTPConnection("127.0.0.1", int(told[1]), timeout=60)
    link.request("GET", "/v2/health/ready")  # waits until it takes requests
    assert link.getresponse().status == 200
    link.close()
    return Server(process, int(told[1]))


@contextlib.contextmanager
def serving(bundle: Path, *flags: str) -> Iterator[Server]:
    """A server that is stopped when the block ends."""
    server = start(bundle, *flags)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


def restarted(bundle: Path, *, clients: int, seconds: float, restarts: int, flags: tuple[str, ...]) -> dict[str, Any]:
    """What became of the requests of a crowd while its server was stopped and started again."""
    crowd, server = crowd_for(bundle), start(bundle, *flags)
    told = [0, 0]

    def stops() -> Iterator[None]:
        nonlocal server
        for _ in range(restarts):
            time.sleep(seconds / (restarts + 1))
            for which, count in enumerate(server.stop()):
                told[which] += count
            server = start(bundle, *flags, port=server.port)
            yield

    crowd.run(server.port, clients=clients, seconds=seconds, during=stops())
    for which, count in enumerate(server.stop()):
        told[which] += count
    got = dict(crowd.statuses)
    return {"statuses": got, "wrong": crowd.wrong, "servers_answered": told[0], "servers_refused": told[1]}


def crowd_for(bundle: Path) -> Crowd:
    """A crowd that knows what it must get: each image's logits, computed alone."""
    with dfq.load(bundle) as runner:
        shape = runner.manifest.preprocess.shape
        images = np.random.default_rng(0).normal(size=(IMAGES, *shape)).astype(np.float32)
        return Crowd(images, np.concatenate([runner(images[n : n + 1]) for n in range(IMAGES)]))


def measure(bundle: Path, seconds: float) -> list[dict[str, Any]]:
    """Requests a second and percentiles of their time, by number of clients and mode.

    Both modes run, and clients turn from one to the other in slices: other work on the machine hits both alike.
    """
    rows = []
    with contextlib.ExitStack() as stack:
        servers = {mode: stack.enter_context(serving(bundle, *flags)) for mode, flags in MODES.items()}
        for clients in CLIENTS:
            crowds, taken = {mode: crowd_for(bundle) for mode in MODES}, dict.fromkeys(MODES, 0.0)
            for _ in range(SLICES):
                for mode, crowd in crowds.items():
                    taken[mode] += crowd.run(servers[mode].port, clients=clients, seconds=seconds / SLICES)
            for mode, crowd in crowds.items():
                assert crowd.wrong == 0, f"{crowd.wrong} answers were another image's"
                assert set(crowd.statuses) == {"200"}, crowd.statuses
                p50, p95, p99 = (1000 * np.percentile(crowd.seconds, (50, 95, 99))).tolist()
                row = {"gather": mode, "clients": clients, "per_s": len(crowd.seconds) / taken[mode]}
                rows.append({**row, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99})
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Export, measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=15, help="of each row")
    parser.add_argument("--bundle", type=Path, help="serve this one in place of DeiT-T with random weights")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = chosen.bundle or Path(folder) / "deit_t"
        if chosen.bundle is None:
            recipe = dfq.Recipe(model="deit_t", random_weights=True, generator="noise", count=4)
            dfq.export(recipe, bundle, limit=1)
        rows = measure(bundle, chosen.seconds)
        crowd = restarted(bundle, clients=32, seconds=2 * chosen.seconds, restarts=2, flags=("--queue", "8"))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps({"rows": rows, "restarted": crowd}, indent=1))
    print("\n| gathering | clients | requests/s | p50, ms | p95, ms | p99, ms |\n|---|---|---|---|---|---|")
    for row in rows:
        cells = " | ".join(f"{row[name]:.1f}" for name in ("per_s", "p50_ms", "p95_ms", "p99_ms"))
        print(f"| {row['gather']} | {row['clients']} | {cells} |")
    print(f"\n32 clients, 8 places, 2 restarts: {crowd}; written to {chosen.out}")


if __name__ == "__main__":
    main()
