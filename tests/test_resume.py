"""Runs that are cut off: the same command goes on where they were, and nothing half-written is ever read.

Started as a program, this file is the process that is cut off: it runs one export again and again in children of its
own, so that torch is imported once, and stops each just before another file would be there.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
from safetensors.numpy import load_file

import dfq_deploy as dfq
from calibrators.errors import BundleError, RecipeError
from calibrators.files import written_whole
from calibrators.images import ImageSet
from dfq_deploy import building, cli
from dfq_deploy.generation.generators import noise
from dfq_deploy.workspace import Workspace
from exporters.bundle import MANIFEST, open_bundle

_MOMENTS = ("images", "ranges", "float", "plan", "recipe", "model.onnx", "classes", "manifest", "report")
_DEMO = dfq.Recipe(model="demo", generator="noise", count=8, refine="none")


class _Log:
    """A watch that remembers which stages there were, and which of them were done already."""

    def __init__(self) -> None:
        self.stages: dict[str, bool] = {}

    def stage(self, name: str, already_done: bool) -> None:
        self.stages[name] = already_done

    def progress(self, done: int, total: int, terms: Mapping[str, float]) -> None:
        pass

    def tell(self, text: str) -> None:
        pass


@pytest.fixture
def run(demo_bundle: Path, tmp_path: Path) -> Path:
    """A finished run that may go on."""
    folder = tmp_path / "run"
    shutil.copytree(demo_bundle, folder)
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds with which images were made."""
    seeds: list[int] = []
    generate = noise.generate

    def counted(*arguments: Any, **options: Any) -> ImageSet:
        seeds.append(arguments[1].seed)
        return generate(*arguments, **options)

    monkeypatch.setattr(noise, "generate", counted)
    return seeds


def _images(folder: Path) -> str:
    (file,) = (folder / "work").glob("images-*.safetensors")
    return ImageSet.load(file).fingerprint


def test_a_finished_run_repeats_nothing_but_the_check(run: Path, calls: list[int]) -> None:
    written, log = (run / "model.onnx").stat().st_mtime_ns, _Log()
    dfq.export(_DEMO, run, limit=4, watch=log)
    assert calls == []
    kept = dict.fromkeys(["images", "ranges", "noise", "float"], True)
    assert log.stages == {"model": False, **kept, "check": False}
    assert (run / "model.onnx").stat().st_mtime_ns == written, "the engine was written again"


def test_ranges_that_are_there_need_no_float_model(tmp_path: Path) -> None:
    recipe = dfq.Recipe(model="demo", generator="noise", count=4, collector="ort", observer="minmax", refine="bias")
    dfq.export(recipe, tmp_path / "run", limit=2)
    log = _Log()
    dfq.export(recipe, tmp_path / "run", limit=2, watch=log)
    assert log.stages["ranges"] and log.stages["float"]


def test_another_seed_makes_other_images_and_keeps_the_float_model(run: Path, calls: list[int]) -> None:
    before, log = _images(run), _Log()
    dfq.export(dfq.Recipe(model="demo", generator="noise", count=8, refine="none", seed=1), run, limit=4, watch=log)
    assert calls == [1]
    assert _images(run) != before
    assert log.stages["float"]
    assert not log.stages["ranges"]
    assert open_bundle(run).recipe["seed"] == 1


def test_another_scheme_makes_another_engine_from_the_same_images(run: Path, calls: list[int]) -> None:
    log = _Log()
    dfq.export(
        dfq.Recipe(model="demo", generator="noise", count=8, refine="none", scheme="w8a8_asym"), run, limit=4, watch=log
    )
    assert calls == []
    assert [stage for stage, already_done in log.stages.items() if not already_done] == [
        "model",
        "noise",
        "engine",
        "check",
    ]
    assert open_bundle(run).scheme == "w8a8_asym"


@pytest.mark.parametrize("name", ["model.onnx", "plan.safetensors", MANIFEST])
def test_a_lost_or_altered_file_is_made_again(run: Path, calls: list[int], name: str) -> None:
    (run / name).write_bytes((run / name).read_bytes()[:-1])
    assert dfq.export(_DEMO, run, limit=4).verdict == "pass"
    (run / name).unlink()
    assert dfq.export(_DEMO, run, limit=4).verdict == "pass"
    assert calls == []


def test_a_failed_stage_keeps_the_ones_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(building, "float_onnx", full)
    with pytest.raises(OSError, match="No space left"):
        dfq.export(_DEMO, tmp_path / "run")
    kept = sorted(file.name.partition("-")[0] for file in (tmp_path / "run" / "work").iterdir())
    assert kept == [".lock", "images", "images", "noise", "ranges"], "the images and their contact sheet"


def test_a_rebuild_that_fails_leaves_no_bundle_of_two_halves(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(building, "save_model", full)
    with pytest.raises(OSError, match="No space left"):
        dfq.export(dfq.Recipe(model="demo", generator="noise", count=8, refine="none", scheme="w8a8_asym"), run)
    with pytest.raises(BundleError, match="is not a bundle"):
        open_bundle(run)


def test_a_second_run_in_the_same_folder_is_told(run: Path) -> None:
    with Workspace(run, lambda *_: None), pytest.raises(RecipeError, match="another run is working in"):
        dfq.export(_DEMO, run)
    assert dfq.export(_DEMO, run, limit=1).n == 1, "the folder stays locked"


def test_an_exception_while_writing_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "new") as temporary:
        temporary.write_text("half")
        temporary.with_name("new.data").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_an_exception_while_writing_leaves_the_old_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]


def test_the_file_is_not_there_before_the_block_ends(tmp_path: Path) -> None:
    with written_whole(tmp_path / "file") as temporary:
        temporary.write_text("whole")
        assert not (tmp_path / "file").exists()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "whole")]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What became of each run of the process that is cut off."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # children of a process with threads cannot compute
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_a_killed_run_dies_where_it_should(records: list[dict[str, Any]]) -> None:
    killed = [record for record in records if record["signal"] == "SIGKILL"]
    assert [record["moment"] for record in killed] == list(_MOMENTS)
    assert {record["code"] for record in killed} == {-signal.SIGKILL}


def test_no_killed_run_leaves_a_file_that_is_not_whole(records: list[dict[str, Any]]) -> None:
    assert [record["broken"] for record in records] == [[]] * len(records)


def test_a_killed_run_is_no_bundle_before_its_manifest_is_there(records: list[dict[str, Any]]) -> None:
    there = {record["moment"]: MANIFEST in record["files"] for record in records if record["signal"] == "SIGKILL"}
    assert there == {moment: moment == "report" for moment in _MOMENTS}


def test_what_a_killed_run_had_finished_is_still_there(records: list[dict[str, Any]]) -> None:
    stages = _MOMENTS[:3]
    for record in records[1:]:
        done = {name.partition("-")[0] for name in record["files"]}
        assert set(stages[: _MOMENTS.index(record["moment"] or "report")]) <= done


def test_the_same_command_finishes_at_last_and_passes(records: list[dict[str, Any]]) -> None:
    last = records[-1]
    assert (last["signal"], last["code"]) == (None, 0)
    assert "report.json" in last["files"]
    assert last["litter"] == [], "what killed runs had half written stays for ever"


def test_ctrl_c_stops_with_three_lines_and_code_3(records: list[dict[str, Any]]) -> None:
    (stopped,) = (record for record in records if record["signal"] == "SIGINT")
    assert stopped["code"] == 3
    assert "Traceback" not in stopped["stderr"]
    assert [line.partition(":")[0] for line in stopped["stderr"].splitlines()[-3:]] == ["error", "  why", "  fix"]
    assert "finished stages are kept" in stopped["stderr"]


def _files(folder: Path) -> list[Path]:
    """Files under their final names."""
    return [file for file in folder.rglob("*") if not any(part.startswith(".writing-") for part in file.parts)]


def _broken(folder: Path) -> list[str]:
    """Files under their final names that do not read as what they are."""
    found = []
    for file in _files(folder):
        try:
            if file.suffix == ".safetensors":
                load_file(file)
            elif file.suffix == ".onnx":
                onnx.checker.check_model(str(file), full_check=True)
            elif file.name == MANIFEST:
                open_bundle(folder)
        except Exception as error:
            found.append(f"{file.name}: {error}")
    return found


def _run_in_child(folder: Path, moment: str | None, name: str | None) -> dict[str, Any]:
    """Run the export in a child that gets the signal `name` before a file called `moment…` is there."""
    errors = folder.with_name("stderr")
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
        os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        replace = Path.replace

        def replace_or_die(self: Path, target: Path) -> Path:
            if moment is not None and name is not None and Path(target).name.startswith(moment):
                os.kill(os.getpid(), signal.Signals[name])
            return replace(self, target)

        Path.replace = replace_or_die  # type: ignore[method-assign,assignment]
        arguments = ["export", "--model", "demo", "--generator", "noise", "--count", "8", "--limit", "16"]
        os._exit(cli.run([*arguments, "--out", str(folder)]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    record = {"moment": moment, "signal": name, "code": code, "stderr": errors.read_text()}
    litter = [str(path) for path in folder.rglob(".writing-*")]
    return record | {"files": [file.name for file in _files(folder)], "litter": litter, "broken": _broken(folder)}


def _main(folder: Path) -> None:
    plan = [(moment, "SIGKILL") for moment in _MOMENTS]
    found = [_run_in_child(folder, moment, name) for moment, name in [*plan[:1], ("ranges", "SIGINT"), *plan[1:]]]
    print(json.dumps([*found, _run_in_child(folder, None, None)]))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
