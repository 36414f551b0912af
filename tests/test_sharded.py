"""How a check is cut into shards: whole batches, and no more of them than their outputs leave room for."""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibrators.errors import DeployError
from dfq_deploy.sharded import logits_elsewhere
from dfq_deploy.workers import Order, first_error_raised
from exporters.bundle import open_bundle


class _Here:
    """Workers that note what they are asked for, and answer with nothing computed, the last shard first."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def answers(self, order: Order) -> Iterator[tuple[int, Any]]:
        self.asked = [(task.arguments[0], task.arguments[1]) for task in order.tasks]
        for number, (start, stop) in reversed([*enumerate(self.asked)]):
            yield number, [{"engine": np.arange(start, stop)}]


@pytest.mark.parametrize(
    ("numbers", "images"), [(10, 128), (1000, 128), (2**22, 16), (2**23, 8), (2**25, 2), (2**26, 1), (2**28, 1)]
)
def test_shards_have_as_many_images_as_their_outputs_leave_room_for(
    demo_bundle: Path, numbers: int, images: int
) -> None:
    workers: Any = _Here()
    pixels = np.zeros((300, 1, 1, 1), np.float32)
    done: list[int] = []
    found = logits_elsewhere(
        workers,
        demo_bundle,
        open_bundle(demo_bundle),
        pixels,
        numbers=numbers,
        checkpoint=None,
        absent=None,
        progress=lambda now, _of: done.append(now),
    )
    assert np.concatenate([batch["engine"] for batch in found]).tolist() == list(range(300))
    assert {stop - start for start, stop in workers.asked[:-1]} == {images}
    assert done[-1] == 300


def test_an_error_gives_up_the_other_tasks_at_once() -> None:
    given_up = []

    def answers() -> Generator[tuple[int, Any], None, None]:
        try:
            yield 0, DeployError(what="it broke.", why="it is a test.", fix="none.")
        finally:
            given_up.append(True)

    try:
        list(first_error_raised(answers()))
    except DeployError:
        assert given_up, "the workers may be gone by the time that the error is forgotten"
    else:
        pytest.fail("no error")
