"""The server: a bundle, an address, and uvicorn between them.

It runs until SIGINT or SIGTERM, then lets nobody in, finishes what it took and says how much that was.
"""

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from calibrators.errors import RecipeError
from dfq_deploy.runtime import load, refuse_others
from dfq_deploy.serving.app import make_app
from dfq_deploy.serving.options import ServeOptions

__all__ = ["Tally", "serve"]


@dataclass(frozen=True)
class Tally:
    """What a server did.

    Attributes:
        answered: Inference requests that got logits.
        refused: Inference requests that got an error.
    """

    answered: int
    refused: int


def serve(
    folder: str | Path,
    options: ServeOptions | None = None,
    *,
    listening: Callable[[str, list[str]], None] | None = None,
) -> Tally:
    """Serve the bundle in `folder` until the process is told to stop; to be called in its main thread.

    Args:
        folder: A bundle with a built engine, or a zip archive of one.
        options: How.
        listening: Called with the address and the names of the models, before the first request.

    Raises:
        BundleError: The bundle is incomplete or altered, not signed as asked, or its engine is pending.
        BackendError: Its run-time is not installed or cannot load it, or it is no classifier.
        RecipeError: The address cannot be had, or the options do not suit the bundle.
    """
    options = options or ServeOptions()
    with load(folder, provider=options.provider, threads=options.threads, verify=options.verify) as runner:
        refuse_others(runner.manifest, "serve", "it speaks of one output, `logits`, and of classes")
        app, service = make_app(runner, options)
        service.warm_up()
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=options.stop_s
        )
        server = uvicorn.Server(config)
        with _socket(options.host, options.port) as listener, _signals_stop(server):
            host, port = listener.getsockname()[:2]
            if listening is not None:
                listening(f"http://{f'[{host}]' if ':' in host else host}:{port}", list(service.models))
            server.run(sockets=[listener])
    return Tally(service.meters.answered, service.meters.refused)


def _socket(host: str, port: int) -> socket.socket:
    try:
        (family, *_), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as cause:
        raise RecipeError(
            what=f"the server cannot listen on {host}, port {port}.",
            why=f"{cause.strerror or cause}.",
            fix="pass another --port (0 for one that is free), or a --host of this machine.",
        ) from cause
    # Connections inherit it. Else the end of an answer waits for the client to acknowledge its head, which takes 40 ms:
    # asyncio sets it only where a socket names its protocol, which this one does not.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


@contextmanager
def _signals_stop(server: uvicorn.Server) -> Iterator[None]:
    """The server heeds these signals while it runs, and sends them on when it has stopped; before that they stop it."""

    def stop(*_: object) -> None:
        server.should_exit = True

    before = {one: signal.signal(one, stop) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
