"""Workers on the machines of a Ray cluster: Ray decides where a task runs, and runs it again where a machine is lost.

The command runs on one of the machines. All of them have the package in the same versions and, where files are read,
find them under the same paths. Whoever reaches a Ray cluster can run code on it: that is so with Ray, and stays so.
"""

import contextlib
import logging
import socket
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from calibrators.errors import BackendError, RecipeError
from dfq_deploy.building import made_with
from dfq_deploy.workers import Order, Task, answer

__all__ = ["answers", "connected"]

_ANSWERS_WITHIN = 5.0  # seconds, for a machine that is reached
_LOOK_EVERY = 30.0  # seconds without an answer between two looks at whether there are machines left
_GIB = 2**30
# How HTTP/2 begins, which gRPC and so Ray speak, and its first frame; the other side's first frame is of the same type.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_SETTINGS = 4


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """See `Workers`; `address` is what `ray.init` takes. A connection that the process has is used, and stays."""
    if ray.is_initialized():
        yield
        return
    try:
        if ":" in address:
            _greet(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
    except (Exception, SystemExit) as cause:
        raise BackendError(
            what=f"there is no Ray cluster to be reached at `{address}`.",
            why=str(cause).strip().split("\n")[0] or type(cause).__name__,
            fix="start one with `ray start --head` (and `ray start --address HOST:PORT` on each further machine), "
            "then pass its HOST:PORT, or auto, on one of its machines.",
        ) from cause
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what Ray tells of machines that were lost is no result
            yield
    finally:
        ray.shutdown()


def answers(order: Order) -> Generator[tuple[int, Any], None, None]:
    """See `Workers`; inside of `connected`."""
    there = _machines()
    for task in order.tasks:
        if refused := _no_room(task, there):
            raise refused
    call = ray.remote(max_calls=1 if order.fresh else 0)(answer)
    shared, where = ray.put(order), (made_with(), str(Path.cwd()))
    waiting = {
        call.options(num_cpus=task.cpus, num_gpus=task.gpus, memory=int(task.memory * _GIB) or None).remote(
            shared, task, *where
        ): number
        for number, task in enumerate(order.tasks)
    }
    try:
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=_LOOK_EVERY)
            if not ready:
                there = _machines()
                for one, number in list(waiting.items()):
                    if refused := _no_room(order.tasks[number], there):
                        ray.cancel(one)
                        del waiting[one]
                        yield number, refused
            for one in ready:
                yield waiting.pop(one), _answer_in(one)
    finally:
        for one in waiting if ray.is_initialized() else ():  # whoever asked has given up, and may have left the cluster
            ray.cancel(one)


def _answer_in(one: Any) -> Any:
    try:
        return ray.get(one)
    except RayError as cause:
        return BackendError(
            what="a task was given up.",
            why=f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}",
            fix="give the command again: what is finished stays; reserve more memory where that ran out.",
        )


def _greet(address: str) -> None:
    """Return if somebody answers at `address` as Ray would: Ray itself tries for two minutes, then ends the process."""
    if address.startswith("ray://"):
        message = "that is the address of a Ray client, which has no share in the cluster's files"
        raise ValueError(message)
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=_ANSWERS_WITHIN) as line:
        line.sendall(_HELLO)
        if line.recv(4)[3:] != bytes((_SETTINGS,)):
            message = f"what listens at {address} is not Ray"
            raise ConnectionError(message)


def _machines() -> list[dict[str, float]]:
    """What the machines that are there have in all, used or not."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _no_room(task: Task, there: Sequence[Mapping[str, float]]) -> RecipeError | None:
    """The error of a task that fits none of the machines, and would wait for ever."""
    asked = {"CPU": float(task.cpus), "GPU": float(task.gpus), "memory": task.memory * _GIB}
    if any(all(node.get(kind, 0.0) >= amount for kind, amount in asked.items()) for node in there):
        return None
    most = {kind: max((node.get(kind, 0.0) for node in there), default=0.0) for kind in asked}
    return RecipeError(
        what=f"no machine of the cluster has room for a task of {task.cpus} CPUs, "
        f"{task.gpus} GPUs and {task.memory:g} GiB.",
        why=f"{len(there)} machines are there, with up to {most['CPU']:g} CPUs, {most['GPU']:g} GPUs and "
        f"{most['memory'] / _GIB:.1f} GiB.",
        fix="start larger machines first, or ask for less: OMP_NUM_THREADS says how many CPUs a task takes, "
        "in a sweep its file.",
    )
