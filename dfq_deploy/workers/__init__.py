"""Workers: who carries out tasks that do not depend on one another; one file per kind.

A task is one call of a function that a module holds: what it takes, and what it needs of a machine. Answers come in the
order in which they are ready. Who runs what when is not decided here: one process at a time, or Ray's scheduler.
"""

import contextlib
import os
import platform
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from calibrators.errors import BackendError, DeployError, RecipeError
from calibrators.registry import pick
from dfq_deploy.building import made_with

__all__ = ["Order", "Task", "Workers", "answer", "first_error_raised", "threads_here", "workers_at"]


@dataclass(frozen=True)
class Task:
    """One call.

    Attributes:
        arguments: What the function takes behind what all tasks share.
        cpus: Threads that it computes with; so many CPUs are reserved for it.
        gpus: GPUs that are reserved for it.
        memory: Memory that is reserved for it, in GiB.
    """

    arguments: tuple[Any, ...]
    cpus: int
    gpus: int = 0
    memory: float = 0.0


@dataclass(frozen=True)
class Order:
    """Tasks that are given out together.

    Attributes:
        function: Called with `shared` and a task's arguments; a function of a module, by whose name workers find it.
        shared: What all calls take first.
        tasks: The calls.
        fresh: Whether each call gets a process of its own; else a process that has made one may make further ones.
    """

    function: Callable[..., Any]
    shared: Any
    tasks: Sequence[Task]
    fresh: bool = False


class Workers(Protocol):
    """What each module in this folder offers."""

    def connected(self, address: str) -> AbstractContextManager[None]:
        """A block in which the workers at `address` can be had.

        Raises:
            BackendError: They cannot.
        """
        ...

    def answers(self, order: Order) -> Generator[tuple[int, Any], None, None]:
        """Number of a task and what it gave, as they are ready; a `DeployError` where it failed, which stops no other.

        Raises:
            RecipeError: No worker has what a task needs.
        """
        ...


@contextlib.contextmanager
def workers_at(ray: str | None) -> Iterator[Workers]:
    """Those of the Ray cluster at an address, or of this machine where there is none, while the block lasts.

    Raises:
        RecipeError: Ray is not installed.
        BackendError: There is no such cluster.
    """
    try:
        workers: Any = pick(__name__, "processes" if ray is None else "ray")
    except ModuleNotFoundError as cause:
        raise RecipeError(
            what=f"--ray needs the package `{cause.name}`, which is not installed.",
            why="only several machines need it.",
            fix="pip install 'dfq-deploy[ray]', on each of them.",
        ) from cause
    with workers.connected(ray or ""):
        yield workers


def answer(order: Order, task: Task, versions: Mapping[str, str], folder: str) -> Any:
    """What a worker does: the call, in the `folder` that it was asked for in where there is one; errors are answers."""
    torch.set_num_threads(task.cpus)
    with contextlib.suppress(OSError):  # of another machine: a file that is not there either will be told by name
        os.chdir(folder)
    try:
        if others := [f"{name} {there}" for name, there in made_with().items() if versions[name] != there]:
            wanted = [f"{name} {versions[name]}" for name in versions if versions[name] != made_with()[name]]
            raise BackendError(
                what=f"{platform.node()} has {', '.join(others)}.",
                why=f"the run was started with {', '.join(wanted)}, and other versions give other numbers.",
                fix="install the same versions on all machines.",
            )
        return order.function(order.shared, *task.arguments)
    except DeployError as error:
        return error
    except Exception as error:  # whatever it is, it ends this task alone
        place = traceback.extract_tb(error.__traceback__)[-1]
        return DeployError(
            what=f"{type(error).__name__}: {error}",
            why=f"line {place.lineno} of {place.filename} raised it.",
            fix="run this one alone to see more.",
        )


def first_error_raised(answers: Generator[tuple[int, Any], None, None]) -> Iterator[tuple[int, Any]]:
    """The answers, for those who need all of them; where one is an error, the other tasks are given up at once.

    Raises:
        DeployError: One of them is that error.
    """
    with contextlib.closing(answers):
        for number, found in answers:
            if isinstance(found, DeployError):
                raise found
            yield number, found


def threads_here() -> int:
    """Threads that PyTorch computes with in this process."""
    return torch.get_num_threads()
