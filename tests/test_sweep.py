"""A sweep's file is read as it stands or refused before anything starts; a run that dies takes no other along."""

import os
import shutil
import signal
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch

import dfq_deploy as dfq
from calibrators.errors import DeployError, RecipeError
from dfq_deploy import cli
from dfq_deploy.building import made_with
from dfq_deploy.generation import GenerateOptions, Progress
from dfq_deploy.generation.making import make_images
from dfq_deploy.models import Model
from dfq_deploy.recipe import GenerateRecipe
from dfq_deploy.sharded import _made_batch, _precision, _Wanted
from dfq_deploy.sweeping import running
from dfq_deploy.sweeping.file import runs_in
from dfq_deploy.sweeping.results import Outcome, Sweep
from dfq_deploy.workers import Order, Task, answer, workers_at
from dfq_deploy.workspace import Workspace, held


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a sweep's file."""

    def written(text: str) -> Path:
        path = tmp_path / "runs.toml"
        path.write_text(text)
        return path

    return written


def test_lists_are_combined_and_the_last_varies_first(write: Callable[[str], Path]) -> None:
    runs = runs_in(write("scheme = ['w8a8', 'w4a16']\nmodel = ['demo', 'vit_t']\nseed = 3\ncount = 7"))
    found = [(run.recipe.scheme, run.recipe.model, run.recipe.seed, run.recipe.count) for run in runs]
    assert found == [(s, m, 3, 7) for s in ("w8a8", "w4a16") for m in ("demo", "vit_t")]
    assert len({run.name for run in runs}) == 4
    assert all(run.name.startswith(f"{run.recipe.model}-{run.recipe.scheme}-dfq-ort-") for run in runs)


def test_fields_that_go_together_stay_together(write: Callable[[str], Path]) -> None:
    runs = runs_in(
        write("model = ['demo', {model = 'vit_b', checkpoint = 'b.pth', memory = 8}]\ncpus = 2\nseed = [0, 1]")
    )
    found = [(run.recipe.model, run.recipe.checkpoint, run.recipe.seed) for run in runs]
    weights = Path("b.pth")
    assert found == [("demo", None, 0), ("demo", None, 1), ("vit_b", weights, 0), ("vit_b", weights, 1)]
    assert [(run.needs.cpus, run.needs.gpus, run.needs.memory) for run in runs] == [(2, 0, 0)] * 2 + [(2, 0, 8)] * 2


_WRONG = {
    "modle = ['demo']": "has a field `modle`, which is none",
    "model = ['demo', {model = 'vit_t', checkpont = 'x'}]": "has a field `checkpont`, which is none",
    "out = 'x'\nmodel = 'demo'": "has a field `out`, which is none",
    "scheme = 'w8a8'": "has no sound `model`",
    "model = 'demo'\nscheme = ['w8a8', 'w8a9']": "has no sound `scheme`",
    "model = 'demo'\ncount = ['many']": "has no sound `count`",
    "model = 'demo'\ncount = 0": "--count 0 makes no images",
    "model = 'demo'\ncpus = 0": "cpus = 0, gpus = 0, memory = 0 can be given to no run",
    "model = 'demo'\nmemory = inf": "can be given to no run",
    "model = ['demo', 'demo']": "twice",
    "model = [{model = 'demo', seed = 1}]\nseed = [1, 2]": "gives `seed` twice for one run",
    "model = []": "gives `model` no value",
    "model = [['demo']]": "has no sound `model`",
    "[model]\nname = 'demo'": "has a table `[model]`",
    "model = 'demo": "cannot be read as a recipe",
}


@pytest.mark.parametrize("text", _WRONG)
def test_a_file_that_is_wrong_starts_nothing(
    text: str, write: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(text)
    assert cli.run(["sweep", str(file)]) == 3
    said = capsys.readouterr().err
    assert _WRONG[text] in said and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["runs.toml"]


def test_two_sweeps_in_one_folder_are_refused(write: Callable[[str], Path], tmp_path: Path) -> None:
    file = write("model = 'demo'")
    with held(tmp_path / "runs"), pytest.raises(RecipeError, match="another run is working in"):
        dfq.sweep(file)


def test_a_row_tells_what_its_name_does_not() -> None:
    error = {"what": "gone.", "why": "so.", "fix": "no."}
    recipes = [{"model": "demo", "scheme": "w8a8", "seed": seed, "count": 8} for seed in (0, 1)]
    one, two = Sweep(tuple(Outcome("demo-w8a8", recipe, None, error) for recipe in recipes), {}).rows()
    assert (one[0], two[0]) == ("demo-w8a8 (seed 0)", "demo-w8a8 (seed 1)")
    longer = {**recipes[0], "checkpoint": "b.pth"}  # a field that is none is not in a recipe's facts
    rows = Sweep(tuple(Outcome("demo-w8a8", recipe, None, error) for recipe in (longer, recipes[0])), {}).rows()
    assert [row[0] for row in rows] == ["demo-w8a8 (checkpoint b.pth)", "demo-w8a8"]
    (alone,) = Sweep((Outcome("demo-w8a8", recipes[0], None, error),), {}).rows()
    assert alone[0] == "demo-w8a8"


def test_a_run_whose_files_have_changed_is_another_one(write: Callable[[str], Path], tmp_path: Path) -> None:
    weights, pictures = tmp_path / "w.safetensors", tmp_path / "pictures"
    (run,) = runs_in(write(f"model = 'demo'\ncheckpoint = '{weights}'\ncalib = 'folder:{pictures}'"))
    pictures.mkdir()
    weights.write_bytes(b"1")
    facts = [running._facts(run, f"npz:{weights}", None)]
    assert facts[0] == running._facts(run, f"npz:{weights}", None)
    for change in (lambda: weights.write_bytes(b"22"), lambda: (pictures / "a.png").write_bytes(b"")):
        change()
        facts.append(running._facts(run, f"npz:{weights}", None))
    assert facts[0] != facts[1] != facts[2]


def _carry_out(_shared: None, what: str) -> int:
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "refuse":
        raise RecipeError(what="not this.", why="so it is.", fix="take another.")
    if what == "break":
        raise ZeroDivisionError(what)
    return os.getpid()


def _order(*asked: str) -> Order:
    return Order(_carry_out, None, [Task((what,), cpus=torch.get_num_threads()) for what in asked])


def test_a_run_that_dies_takes_no_other_along() -> None:
    with workers_at(None) as workers:
        found = list(workers.answers(_order("die", "live")))
    assert found[0][1].why == "it was ended by SIGKILL, as where memory runs out."
    number, process = found[1]
    assert number == 1 and isinstance(process, int) and process != os.getpid()


def test_errors_are_answers_and_come_through_as_they_are() -> None:
    order = _order("refuse", "break")
    refused, broken = (answer(order, task, made_with(), str(Path.cwd())) for task in order.tasks)
    found = ForkingPickler.loads(ForkingPickler.dumps(refused))
    assert isinstance(found, RecipeError)
    assert str(found) == "not this.\n  why: so it is.\n  fix: take another."
    assert isinstance(broken, DeployError)
    assert (broken.what, "test_sweep.py" in broken.why) == ("ZeroDivisionError: break", True)


def test_a_worker_with_other_versions_is_refused() -> None:
    order = _order("live")
    found = answer(order, order.tasks[0], {**made_with(), "torch": "1.0"}, str(Path.cwd()))
    assert isinstance(found, DeployError)
    assert f"has torch {made_with()['torch']}" in found.what
    assert "torch 1.0" in found.why


def test_a_stage_that_another_run_has_finished_is_taken_from_there(tmp_path: Path) -> None:
    def make(text: str) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            path.with_name(f"{path.name}.png").write_text("sheet")
            path.write_text(text)

        return write

    with Workspace(tmp_path / "one", lambda *_: None) as work:
        work.stage("images", ".safetensors", ["facts"], make("made by one"))
    told: list[tuple[str, bool]] = []
    with Workspace(tmp_path / "two", lambda *stage: told.append(stage), tmp_path) as work:
        path = work.stage("images", ".safetensors", ["facts"], make("made again"))
        other = work.stage("ranges", ".safetensors", ["facts"], make("made by two"))
    assert path.is_relative_to(tmp_path / "two")
    assert (path.read_text(), path.with_name(f"{path.name}.png").read_text()) == ("made by one", "sheet")
    assert other.read_text() == "made by two"
    assert told == [("images", True), ("ranges", False)]
    shutil.rmtree(tmp_path / "one")
    assert path.read_text() == "made by one"


def test_only_batches_that_are_missing_are_asked_for_and_the_set_is_the_same(demo: Model, tmp_path: Path) -> None:
    options = GenerateOptions(75, 5, keep_in=tmp_path / "alone")
    alone = make_images(["dead_leaves"], demo, options)
    recipe = GenerateRecipe(model="demo", generator="dead_leaves", seed=5)
    wanted = _Wanted(recipe, demo.fingerprint, "cpu", _precision("cpu"))
    asked: list[tuple[int, int]] = []

    def elsewhere(generator: str, batches: Any, progress: Progress) -> None:
        asked.extend(batches)
        for first, count in batches:
            for name, content in _made_batch(wanted, generator, first, count).items():
                (tmp_path / "shared" / name).write_bytes(content)

    kept = tmp_path / "shared"
    kept.mkdir()
    shutil.copy(min((tmp_path / "alone").iterdir(), key=lambda file: file.stat().st_size), kept)  # the last, of 11
    shared = make_images(["dead_leaves"], demo, GenerateOptions(75, 5, keep_in=kept, elsewhere=elsewhere))
    assert asked == [(0, 32), (32, 32)]
    assert (shared.made_by, shared.fingerprint) == (alone.made_by, alone.fingerprint)
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "alone").iterdir()
    }


@pytest.mark.parametrize("fault", ["weights", "precision"])
def test_a_machine_that_would_make_other_images_is_refused(demo: Model, fault: str) -> None:
    other = {"weights": ("0" * 64, _precision("cpu")), "precision": (demo.fingerprint, "float8")}[fault]
    wanted = _Wanted(GenerateRecipe(model="demo"), other[0], "cpu", other[1])
    with pytest.raises(DeployError, match="than on another" if fault == "weights" else "computes fastest in"):
        _made_batch(wanted, "dead_leaves", 0, 1)


def _outcome(name: str, verdict: str) -> Outcome:
    if verdict == "error":
        return Outcome(name, {}, None, {"what": "a | b.", "why": "so.", "fix": "fix it."})
    found = {
        "verdict": verdict,
        "reason": "because",
        "top1": None,
        "drop": None,
        "agreement": {"engine_float": 97.5},
        "sqnr_db": {"engine_float": None},
        "bytes": 2**20,
        "seconds": 1.0,
    }
    return Outcome(name, {}, found, None)


@pytest.mark.parametrize(
    ("verdicts", "wanted"),
    [
        (["pass", "pass"], "pass"),
        (["pass", "undecided"], "undecided"),
        (["undecided", "fail"], "fail"),
        (["pass", "error"], "fail"),
    ],
)
def test_one_verdict_and_one_row_per_run(verdicts: list[str], wanted: str, tmp_path: Path) -> None:
    found = Sweep(tuple(_outcome(f"run{number}", verdict) for number, verdict in enumerate(verdicts)), {})
    found.save(tmp_path)
    assert found.verdict == found.report()["verdict"] == wanted
    rows = (tmp_path / "sweep.md").read_text().splitlines()[4:]
    assert [row.replace("\\|", "").count("|") for row in rows] == [10] * len(verdicts)
    assert [row.split(" | ")[1] for row in rows] == verdicts
