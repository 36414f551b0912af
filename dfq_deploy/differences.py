"""How far apart several networks are on the same images, measured batch by batch.

Rows of outputs come in, one number per image and pair of networks comes out: outputs can be large, as those of a
segmentation are, and are not kept. What an agreement is, is the task's business. Knows no engine and no plan.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dfq_deploy.measures import cosine, sqnr_db
from dfq_deploy.tasks import Task
from exporters.outputs import Output, parts_of

__all__ = ["Differences"]


class Differences:
    """What is known of pairs of networks after the batches so far.

    A network may be seen several times on the same images: (k, N, numbers) in place of (N, numbers).

    Args:
        task: What the outputs are.
        outputs: Their names and shapes.
        pairs: Which network is held against which: by the pair's name, what was found and what is wanted.
    """

    def __init__(self, task: Task, outputs: Sequence[Output], pairs: Mapping[str, tuple[str, str]]) -> None:
        self._task, self._outputs, self._pairs = task, outputs, pairs
        self._distances: dict[str, list[np.ndarray]] = defaultdict(list)
        self._cosines: dict[str, list[np.ndarray]] = defaultdict(list)
        self._agreements: dict[str, list[np.ndarray]] = defaultdict(list)
        self._powers: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._logits: dict[str, list[np.ndarray]] = defaultdict(list)

    def add(self, rows: Mapping[str, np.ndarray]) -> None:
        """A batch of images: what each network puts out for it."""
        parts = {name: parts_of(values.astype(np.float64), self._outputs) for name, values in rows.items()}
        for pair, (first, second) in self._pairs.items():
            found, wanted = parts[first], parts[second]
            self._distances[pair].append(self._per_image(_distance, found, wanted))
            self._cosines[pair].append(self._per_image(cosine, found, wanted))
            self._agreements[pair].append(self._agreement(found, wanted))
            signal = sum(float(np.square(part).sum()) for part in wanted.values())
            noise = sum(float(np.square(wanted[name] - part).sum()) for name, part in found.items())
            self._powers[pair].append((signal, noise))
        if self._task.decide(parts_of(next(iter(rows.values()))[:1], self._outputs)) is not None:
            for name, found in parts.items():
                self._logits[name].append(next(iter(found.values())))

    def distance(self, pair: str) -> np.ndarray:
        """|a - b|² / |b|² of each image, (n,): the mean over the outputs and over the times that it was seen."""
        return np.concatenate(self._distances[pair])

    def cosine(self, pair: str) -> np.ndarray:
        """Cosine of each image, (n,): the mean over the outputs and over the times that it was seen."""
        return np.concatenate(self._cosines[pair])

    def agreement(self, pair: str) -> np.ndarray:
        """Agreement on each image from 0 to 1, (n,), or (k, n) of a network that was seen several times."""
        return np.concatenate(self._agreements[pair], axis=-1)

    def sqnr_db(self, pair: str) -> float:
        """Signal to quantization noise ratio of all that is put out, in dB."""
        signal, noise = np.sum(self._powers[pair], axis=0)
        return sqnr_db(float(signal), float(noise))

    @property
    def logits(self) -> dict[str, np.ndarray]:
        """The logits of each network, (n, classes) or (k, n, classes); none where images have no one class."""
        return {name: np.concatenate(parts, axis=-2) for name, parts in self._logits.items()}

    def _agreement(self, found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> np.ndarray:
        first = next(iter(found))
        if found[first].ndim == wanted[first].ndim:
            return self._task.agree(found, wanted)
        times = range(len(found[first]))
        return np.stack([self._task.agree({k: v[time] for k, v in found.items()}, wanted) for time in times])

    def _per_image(
        self,
        measure: Callable[[np.ndarray, np.ndarray], np.ndarray],
        found: Mapping[str, np.ndarray],
        wanted: Mapping[str, np.ndarray],
    ) -> np.ndarray:
        """(N,): `measure` of each output as one vector, the mean over outputs and times."""
        values = []
        for output in self._outputs:
            a, b = (part[output.name] for part in (found, wanted))
            flat = (part.reshape(*part.shape[: part.ndim - len(output.shape)], -1) for part in (a, b))
            one = measure(*flat)
            values.append(one.reshape(-1, one.shape[-1]).mean(0))
        return np.asarray(np.mean(values, axis=0)) if len(values) > 1 else values[0]


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b|² / |b|²; unlike a cosine it sees a wrong scale."""
    return np.asarray(np.square(a - b).sum(-1) / np.maximum(np.square(b).sum(-1), 1e-30))
