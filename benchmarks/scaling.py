"""How much sooner several workers are done: images and a check on a Ray cluster of 1, 2, … workers on this machine.

Each worker is a node of its own with one CPU, and computes with one thread. The cluster and the workers' first imports
are left out: each cluster first does a little of the same work. Efficiency is the time of one worker over that of n, n
times; workers share this machine's memory and caches, so that it says what is lost to Ray, to shards and to them.
"""

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from ray.cluster_utils import Cluster

import dfq_deploy as dfq
from calibrators.files import write_json
from dfq_deploy.building import made_with
from dfq_deploy.recipe import GenerateRecipe
from dfq_deploy.workers import workers_at

_STORE = 512 * 2**20  # bytes of memory per node for what tasks hand over


@contextlib.contextmanager
def _cluster(workers: int) -> Iterator[str]:
    """The address of a cluster of so many nodes with a CPU each."""
    cluster = Cluster()
    cluster.add_node(num_cpus=0, object_store_memory=_STORE, include_dashboard=False)
    for _ in range(workers):
        cluster.add_node(num_cpus=1, object_store_memory=_STORE)
    try:
        yield cluster.address
    finally:
        cluster.shutdown()


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _measured(asked: argparse.Namespace, bundle: Path, address: str, workers: int) -> dict[str, float]:
    """Seconds of both kinds of work, behind what warms the workers up."""

    def images(count: int, seed: int) -> Callable[[], object]:
        recipe = GenerateRecipe(model=asked.model, random_weights=asked.random_weights, count=count, seed=seed)
        return lambda: dfq.generate(recipe, bundle.with_name("images.safetensors"), ray=address)

    made = str(bundle.with_name("checked.safetensors"))
    with workers_at(address):  # one connection, so that workers stay
        images(32 * workers, seed=1)()
        dfq.check(bundle, images=made, limit=128 * workers, ray=address)
        return {
            "generate": _seconds(images(asked.count, seed=0)),
            "check": _seconds(lambda: dfq.check(bundle, images=made, ray=address)),
        }


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_t")
    parser.add_argument("--random-weights", action="store_true", help="time does not depend on the weights")
    parser.add_argument("--count", type=int, default=256, help="images to make; 32 make a shard")
    parser.add_argument("--checked", type=int, default=1024, help="images to check on; 128 make a shard")
    parser.add_argument("--workers", default="1,2", help="how many, with commas between them")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling.json"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "settings": {**vars(asked), "out": None},
        "cores": os.cpu_count(),
        "made_with": made_with(),
    }
    with tempfile.TemporaryDirectory() as place:
        bundle = Path(place) / "bundle"
        noise: dict[str, Any] = {"model": asked.model, "random_weights": asked.random_weights, "generator": "noise"}
        dfq.export(dfq.Recipe(**noise, count=8, refine="none", spare="none"), bundle)
        recipe = GenerateRecipe(**noise, count=asked.checked)
        dfq.generate(recipe, bundle.with_name("checked.safetensors"))
        for workers in map(int, asked.workers.split(",")):
            with _cluster(workers) as address:
                found[str(workers)] = _measured(asked, bundle, address, workers)
    first = int(asked.workers.split(",")[0])
    for workers in map(int, asked.workers.split(",")):
        for kind, seconds in found[str(workers)].items():
            share = 100 * first * found[str(first)][kind] / (workers * seconds)
            print(f"{kind}, {workers} workers: {seconds:.1f} s, efficiency {share:.0f} %")
    write_json(asked.out, found)


if __name__ == "__main__":
    main()
