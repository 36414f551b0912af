"""Workers on this machine: one process after another, so that one that crashes takes nobody along."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Generator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from calibrators.errors import BackendError
from dfq_deploy.building import made_with
from dfq_deploy.workers import Order, Task, answer

__all__ = ["answers", "connected"]


def connected(_address: str) -> contextlib.nullcontext[None]:
    """See `Workers`; this machine is always there."""
    return contextlib.nullcontext()


def answers(order: Order) -> Generator[tuple[int, Any], None, None]:
    """See `Workers`; each task has a process of its own."""
    for number, task in enumerate(order.tasks):
        yield number, _in_a_process(order, task)


def _in_a_process(order: Order, task: Task) -> Any:
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads cannot compute
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send_answer, args=(sending, order, task, made_with(), str(Path.cwd())))
    process.start()
    sending.close()  # or its end would not be seen when the process dies
    try:
        return receiving.recv()
    except EOFError:
        process.join()
        return _died(process.exitcode or 0)
    finally:
        process.kill()
        process.join()


def _send_answer(sending: Connection, order: Order, task: Task, versions: dict[str, str], folder: str) -> None:
    try:
        sending.send(answer(order, task, versions, folder))
    except KeyboardInterrupt:  # the one who waits for it says so
        os._exit(1)


def _died(code: int) -> BackendError:
    how = f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with {code}"
    return BackendError(
        what="the process of this run died.",
        why=f"{how}{', as where memory runs out' if code == -signal.SIGKILL else ''}.",
        fix="run it alone to see more, or with more memory.",
    )
