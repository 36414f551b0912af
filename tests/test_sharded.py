"""How a check is cut into shards: whole batches, and no more of them than their outputs leave room for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dfq_deploy.sharded import logits_elsewhere
from dfq_deploy.workers import Order
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
