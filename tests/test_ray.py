"""A cluster of two nodes, started here: what it makes is what one machine makes, also when a node is lost on the way.

A node is a machine to Ray, with processes of its own; here all of them share this one.
"""

import contextlib
import dataclasses
import json
import operator
import re
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import dfq_deploy as dfq
from calibrators.errors import BackendError, RecipeError
from calibrators.images import ImageSet
from calibrators.registry import pick
from dfq_deploy import workers
from dfq_deploy.cli import run
from dfq_deploy.recipe import GenerateRecipe
from dfq_deploy.workers import Order, Task, workers_at

ROOT = Path(__file__).parent.parent
ray_cluster = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed: pip install 'dfq-deploy[ray]'")

_STORE = 100 * 2**20  # bytes of memory for what tasks hand over
_QUICK = {
    "--model deit_t --count 10000": "--model demo --generator dead_leaves --count 33",
    "sweep runs.toml": "sweep runs.toml --limit 16",
}
_DEMO = "generator = 'noise'\ncount = 8\nrefine = 'none'\nspare = 'none'\n"


class _Nodes:
    """A cluster of a head that runs no tasks, and two nodes with one CPU each."""

    def __init__(self) -> None:
        self._cluster = ray_cluster.Cluster()
        eager = {"worker_niceness": 0}  # of 15, as Ray has it, they get nothing beside other tests
        self._cluster.add_node(num_cpus=0, object_store_memory=_STORE, include_dashboard=False, _system_config=eager)
        self._nodes = [self._add(), self._add()]
        self.address: str = self._cluster.address

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=1, object_store_memory=_STORE)

    @contextlib.contextmanager
    def with_a_larger_one(self) -> Iterator[Callable[[], None]]:
        """A third node, with two CPUs; what is given kills it."""
        node = self._cluster.add_node(num_cpus=2, object_store_memory=_STORE)
        lost: list[object] = []

        def lose() -> None:
            if not lost:
                lost.append(self._cluster.remove_node(node, allow_graceful=False))

        try:
            yield lose
        finally:
            lose()

    def lose_one(self) -> None:
        """Kill a node with all its processes, as when a machine fails."""
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)

    def complete(self) -> None:
        """Start anew what was lost."""
        while len(self._nodes) < 2:
            self._nodes.append(self._add())

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def running() -> Iterator[_Nodes]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a task takes as many CPUs as there are threads here
    nodes = _Nodes()
    yield nodes
    nodes.close()
    torch.set_num_threads(threads)


@pytest.fixture
def nodes(running: _Nodes) -> _Nodes:
    """The cluster, with both nodes."""
    running.complete()
    return running


class _Watch:
    """Calls `event` when the first part of the stage `of` is done."""

    def __init__(self, event: Callable[[], object], of: str) -> None:
        self.told: list[str] = []
        self._event, self._of, self._stage = event, of, ""

    def stage(self, name: str, already_done: bool) -> None:
        self._stage = name

    def progress(self, done: int, total: int, terms: Mapping[str, float]) -> None:
        if self._stage == self._of and 0 < done < total:
            self._of = ""
            self._event()

    def tell(self, text: str) -> None:
        self.told.append(text)


def test_images_are_the_same_bytes_although_a_node_is_lost(nodes: _Nodes, tmp_path: Path) -> None:
    recipe = GenerateRecipe(model="demo", generator="dead_leaves", count=6 * 32 + 5, seed=3)
    dfq.generate(recipe, tmp_path / "one.safetensors")
    lost: list[float] = []

    def lose() -> None:
        nodes.lose_one()
        lost.append(time.monotonic())

    dfq.generate(recipe, tmp_path / "many.safetensors", ray=nodes.address, watch=_Watch(lose, "images"))
    assert lost, "no node was lost on the way"
    assert (tmp_path / "many.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    assert len(ImageSet.load(tmp_path / "many.safetensors")) == recipe.count
    assert not list(tmp_path.glob("*.batches"))


def test_a_check_gives_the_same_report(nodes: _Nodes, demo_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(demo_bundle, bundle)
    alone = dfq.check(bundle)
    report = _said(bundle)
    shared = dfq.check(bundle, ray=nodes.address)
    assert dataclasses.asdict(shared) | {"stages": None} == dataclasses.asdict(alone) | {"stages": None}
    assert shared.n == 360
    assert _said(bundle) == report


def _said(bundle: Path) -> dict[str, Any]:
    """What the report says but for the time and memory that stages took."""
    found: dict[str, Any] = json.loads((bundle / "report.json").read_text()) | {"stages": None}
    return found


def test_a_sweep_loses_a_node_and_no_run_and_goes_on_where_it_was(nodes: _Nodes, tmp_path: Path) -> None:
    file = tmp_path / "runs.toml"
    file.write_text(f"model = ['no_such_model', {{model = 'demo', seed = 0}}, {{model = 'demo', seed = 1}}]\n{_DEMO}")
    watch = _Watch(nodes.lose_one, "runs")
    found = dfq.sweep(file, limit=16, ray=nodes.address, watch=watch)
    assert [one.verdict for one in found.outcomes] == ["error", "pass", "pass"], watch.told
    assert found.verdict == "fail"
    assert (found.outcomes[0].error or {})["what"] == "timm has no model named `no_such_model`."
    report = json.loads((tmp_path / "runs" / "sweep.json").read_text())
    assert [run["verdict"] for run in report["runs"]] == ["error", "pass", "pass"]
    for one in found.outcomes[1:]:
        dfq.load(tmp_path / "runs" / one.name).close()
    again = _Watch(lambda: None, "runs")
    assert dfq.sweep(file, limit=16, ray=nodes.address, watch=again).outcomes[1:] == found.outcomes[1:]
    assert [text.split(":")[0] for text in again.told] == [found.outcomes[0].name], "what is finished was run again"


def test_the_commands_of_the_page_run(
    nodes: _Nodes, demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo_bundle, tmp_path / "runs" / "deit_t")
    Path("images").mkdir()
    for grey in (0, 100, 200):
        Image.new("L", (32, 32), grey).save(f"images/{grey}.png")
    Path("runs.toml").write_text(f"model = 'demo'\n{_DEMO}")
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "scale.md").read_text(), re.DOTALL)
    lines = re.findall(r"^dfq-deploy (.* --ray HOST:6379)$", "".join(blocks), re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["generate", "check", "sweep"]
    for line in lines:
        for there, here in (_QUICK | {"HOST:6379": nodes.address, "/shared": str(tmp_path)}).items():
            line = line.replace(there, here)
        assert run(shlex.split(line)) in (0, 2), line  # 2: three images say little
    assert len(ImageSet.load(Path("images.safetensors"))) == 33


def test_what_no_node_has_room_for_is_refused_and_does_not_wait(nodes: _Nodes) -> None:
    with workers_at(nodes.address) as crew, pytest.raises(RecipeError, match="no machine of the cluster has room"):
        next(iter(crew.answers(Order(len, (), [Task((), cpus=1000)]))))


def test_what_no_node_has_room_for_any_more_stops_no_other(nodes: _Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    with nodes.with_a_larger_one() as lose, workers_at(nodes.address) as crew:
        monkeypatch.setattr(pick("dfq_deploy.workers", "ray"), "_LOOK_EVERY", 1.0)
        found = crew.answers(Order(operator.call, time.sleep, [Task((600,), cpus=2), Task((0,), cpus=1)]))
        assert next(found) == (1, None)
        lose()
        number, refused = next(found)
        assert (number, type(refused)) == (0, RecipeError)
        assert "room for a task of 2 CPUs" in refused.what
        assert not list(found)


def _mute() -> socket.socket:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    return listening


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "no.such.host.invalid:6379", "nonsense", "ray://127.0.0.1:1", "a:b"]
)
def test_a_cluster_that_is_not_there_is_told_at_once(address: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(BackendError, match="no Ray cluster to be reached") as told:
        dfq.generate(GenerateRecipe(model="demo"), tmp_path / "images.safetensors", ray=address)
    assert "ray start --head" in told.value.fix
    assert time.monotonic() - began < 30


def test_what_listens_and_says_nothing_is_no_cluster(tmp_path: Path) -> None:
    with _mute() as listening, pytest.raises(BackendError, match="no Ray cluster to be reached"):
        dfq.check(tmp_path, ray="{}:{}".format(*listening.getsockname()))


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "dfq_deploy.workers.ray", raising=False)
    monkeypatch.delattr(workers, "ray", raising=False)
    with pytest.raises(RecipeError, match="needs the package `ray`") as told:
        dfq.check(tmp_path, ray="auto")
    assert told.value.fix.startswith("pip install 'dfq-deploy[ray]'")
