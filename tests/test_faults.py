"""Full disks, kills and rivals: what is read back is whole or refused, and the same command ends with the same bytes.

Started as a program, this file is the process that is killed, as in `test_resume`, but at random moments: it runs one
export again and again in children of its own, so that torch is imported once.
"""

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from tiny_bundle import tiny_bundle

import dfq_deploy as dfq
from calibrators.errors import BundleError, DeployError, RecipeError
from calibrators.files import is_plain_file, sha256_of, written_whole
from dfq_deploy import cli, packing
from dfq_deploy.recipe import AuditRecipe, CalibrateRecipe, GenerateRecipe, SimulateRecipe
from dfq_deploy.workspace import held, held_file
from exporters.bundle import MANIFEST, open_bundle

_NOISE: dict[str, Any] = {"model": "demo", "generator": "noise", "count": 8, "refine": "none"}
_OTHER = dfq.Recipe(**_NOISE, scheme="w8a8_asym")  # than that of the demo bundle: all from the plan on is made again
_KILLS = 5


@pytest.fixture
def run(demo_bundle: Path, tmp_path: Path) -> Path:
    """A finished run of another scheme."""
    return shutil.copytree(demo_bundle, tmp_path / "run")


@pytest.fixture(scope="module")
def undisturbed(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run that nothing disturbs ends with."""
    folder = shutil.copytree(demo_bundle, tmp_path_factory.mktemp("undisturbed") / "run")
    dfq.export(_OTHER, folder, limit=4)
    return _hashes(folder)


def _hashes(folder: Path) -> dict[str, str]:
    """Hashes of files; of the report, what it says but for the time and memory that stages took."""
    found = {file.name: sha256_of(file) for file in folder.iterdir() if is_plain_file(file)}
    report = folder / "report.json"
    if report.exists():
        said = json.loads(report.read_text()) | {"stages": None}
        found[report.name] = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    return found


def _broken(folder: Path) -> list[str]:
    """What is read as whole under its final name and is not."""
    found = []
    for file in folder.rglob("*.safetensors"):
        if not any(part.startswith(".writing-") for part in file.parts):
            try:
                load_file(file)
            except Exception as error:
                found.append(f"{file.name}: {error}")
    for file in folder.glob("*.json"):
        json.loads(file.read_text())
    if (folder / MANIFEST).exists():
        try:
            open_bundle(folder)
        except DeployError as error:
            found.append(str(error))
    return found


class _Disk:
    """A disk that is full from the `last`-th file on, either while it is written or when it is moved to its place."""

    def __init__(self, last: int, *, moving: bool) -> None:
        self.written, self._last, self._moving = 0, last, moving

    @contextlib.contextmanager
    def written_whole(self, path: Path) -> Iterator[Path]:
        with written_whole(path) as temporary:
            yield temporary
            self.written += 1
            if self.written > self._last:
                if not self._moving:
                    content = temporary.read_bytes()
                    temporary.write_bytes(content[: len(content) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def put_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have every module that writes files write to this disk."""
        for module in [*sys.modules.values()]:
            ours = getattr(module, "__name__", "").startswith(("calibrators", "exporters", "dfq_deploy"))
            if ours and getattr(module, "written_whole", None) is written_whole:
                monkeypatch.setattr(module, "written_whole", self.written_whole)


@pytest.mark.parametrize("last", range(7))
def test_a_disk_that_fills_up_leaves_no_half_and_a_second_run_ends_as_the_first_would(
    run: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    disk = _Disk(last, moving=bool(last % 2))
    with monkeypatch.context() as patch:
        disk.put_in(patch)
        with pytest.raises(OSError, match="No space left"):
            dfq.export(_OTHER, run, limit=4)
    assert disk.written == last + 1
    assert _broken(run) == []
    assert not list(run.rglob(".writing-*"))
    sealed = (run / MANIFEST).exists()
    assert sealed == (last in (0, 6)), (
        "the first file is a stage's, the last is the report, all else is a half bundle's"
    )
    assert (run / "report.json").exists() == (last == 0), "the report of another engine"
    assert dfq.export(_OTHER, run, limit=4).verdict == "pass"
    assert _hashes(run) == undisturbed


def test_a_disk_that_fills_up_is_told_in_three_lines(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = _Disk(0, moving=False)
    disk.put_in(monkeypatch)
    monkeypatch.setattr(packing, "written_whole", disk.written_whole)
    assert cli.run(["check", str(run), "--limit", "2"]) == 3
    assert "No space left" in capsys.readouterr().err
    assert _broken(run) == []
    assert cli.run(["pack", str(run), "--out", str(run / "b.zip")]) == 3
    assert not (run / "b.zip").exists()


_RIVALS: dict[str, Callable[[Path], object]] = {
    "export": lambda folder: dfq.export(dfq.Recipe(**_NOISE), folder),
    "build": lambda folder: dfq.build(folder),
    "check": lambda folder: dfq.check(folder, limit=2),
    "calibrate": lambda folder: dfq.calibrate(CalibrateRecipe(**_NOISE), folder / "plan.safetensors"),
    "simulate": lambda folder: dfq.simulate(SimulateRecipe(**_NOISE), folder, limit=2),
    "audit": lambda folder: dfq.audit(folder, AuditRecipe(), folder),
    "bench": lambda folder: dfq.bench_generators(dfq.GeneratorsRecipe(model="demo", generators="noise"), folder),
}


@pytest.mark.parametrize("command", _RIVALS)
def test_of_two_runs_in_one_folder_one_is_told(run: Path, command: str) -> None:
    before = _hashes(run)
    with held(run), pytest.raises(RecipeError, match="another run is working in"):
        _RIVALS[command](run)
    assert _hashes(run) == before


@pytest.mark.parametrize("command", ["calibrate", "simulate"])
def test_what_makes_no_bundle_leaves_one_as_it_is(run: Path, command: str) -> None:
    before, work = _hashes(run), sorted((run / "work").iterdir())
    with pytest.raises(RecipeError, match="holds a bundle"):
        _RIVALS[command](run)
    assert _hashes(run) == before
    assert sorted((run / "work").iterdir()) == work


def test_a_folder_is_free_again_and_keeps_nothing_of_a_lock(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    before = sorted(bundle.iterdir())
    for _ in range(2):
        with held(bundle) as work, pytest.raises(RecipeError, match="another run"), held(bundle):
            pass
        assert not work.exists()
    assert sorted(bundle.iterdir()) == before


def test_two_runs_do_not_make_one_file(tmp_path: Path) -> None:
    recipe = GenerateRecipe(model="demo", generator="noise", count=2)
    with held_file(tmp_path / "images.safetensors"):
        with pytest.raises(RecipeError, match="another run is writing"):
            dfq.generate(recipe, tmp_path / "images.safetensors")
        dfq.generate(recipe, tmp_path / "others.safetensors")
    assert len(dfq.generate(recipe, tmp_path / "images.safetensors")) == 2
    assert not [*tmp_path.glob(".*")]


def test_a_folder_that_cannot_be_written_to_is_told_at_once(tmp_path: Path, demo_bundle: Path) -> None:
    """Below a file, since root may write to any folder."""
    (tmp_path / "file").write_text("no folder")
    below = tmp_path / "file" / "run"
    with pytest.raises(RecipeError, match="cannot be written to"):
        dfq.export(_OTHER, below)
    with pytest.raises(RecipeError, match="cannot be written to"), held(below):
        pass
    with pytest.raises(BundleError, match="is not a bundle"):
        dfq.check(below)
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        dfq.pack(demo_bundle, below / "b.zip")


def test_a_read_only_folder_is_read_and_not_written_to(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    bundle.chmod(0o500)
    as_others = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []  # root may write everywhere
    script = "import sys; import dfq_deploy as dfq; dfq.load(sys.argv[1]).close(); print(1); dfq.build(sys.argv[1])"
    try:
        given = [*as_others, sys.executable, "-c", script, str(bundle)]
        done = subprocess.run(given, capture_output=True, text=True, timeout=120, check=False)
    finally:
        bundle.chmod(0o700)
    assert done.stdout == "1\n", "it could not be loaded"
    assert "RecipeError: " in done.stderr and "cannot be written to" in done.stderr


@pytest.fixture(scope="module")
def records(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of each run of the process that is killed, and of two at once."""
    folder = shutil.copytree(demo_bundle, tmp_path_factory.mktemp("killed") / "run")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # children of a process with threads cannot compute
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_run_that_is_killed_at_random_leaves_what_is_whole_or_refused(
    records: dict[str, Any], undisturbed: dict[str, str]
) -> None:
    killed = records["killed"]
    assert [record["broken"] for record in killed] == [[]] * len(killed)
    assert killed[-1]["code"] == 0
    assert {record["code"] for record in killed[:-1]} <= {-signal.SIGKILL, 0}
    assert -signal.SIGKILL in {record["code"] for record in killed}
    assert records["files"] == undisturbed


def test_two_exports_at_once_end_with_one_bundle(records: dict[str, Any], undisturbed: dict[str, str]) -> None:
    """In processes of their own: one wins, one is told, and the folder is as if there had been one."""
    codes, said = records["rivals"]["codes"], records["rivals"]["said"]
    assert sorted(codes) in ([0, 3], [0, 0]), "the second may have come when the first was done"
    for code, text in zip(codes, said, strict=True):
        assert ("another run is working in" in text) == (code == 3)
        assert "Traceback" not in text
    assert records["rivals"]["files"] == undisturbed


def _export_in_child(folder: Path, errors: Path) -> int:
    """Start the export in a child; returns its id."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
        arguments = ["export", "--model", "demo", "--generator", "noise", "--count", "8", "--refine", "none"]
        os._exit(cli.run([*arguments, "--scheme", "w8a8_asym", "--limit", "4", "--out", str(folder)]))
    return child


def _code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _killed_after(folder: Path, seconds: float | None) -> dict[str, Any]:
    child = _export_in_child(folder, folder.with_name("stderr"))
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return {"seconds": seconds, "code": _code(child), "broken": _broken(folder)}


def _main(folder: Path) -> None:
    shared = shutil.copytree(folder, folder.with_name("shared"))
    errors = [folder.with_name(f"stderr-{number}") for number in range(2)]
    began = time.monotonic()
    children = [_export_in_child(shared, file) for file in errors]
    codes = [_code(child) for child in children]
    whole, chance = time.monotonic() - began, random.Random(0)
    rivals = {"codes": codes, "said": [file.read_text() for file in errors], "files": _hashes(shared)}
    killed = [_killed_after(folder, chance.uniform(0, whole)) for _ in range(_KILLS)]
    killed.append(_killed_after(folder, None))
    print(json.dumps({"rivals": rivals, "killed": killed, "files": _hashes(folder)}))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
