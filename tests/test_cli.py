"""The command line: each command runs, each mistake is told in three lines, and nobody waits for `--help`."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from syrupy.assertion import SnapshotAssertion

import dfq_deploy as dfq
from calibrators.images import ImageSet
from calibrators.plan import QuantPlan
from dfq_deploy import auditing, cli, pipeline
from dfq_deploy.evaluate import Check
from dfq_deploy.recipe import AuditRecipe, CalibrateRecipe, GenerateRecipe, Recipe, SimulateRecipe

_NOISE = ["--model", "demo", "--generator", "noise"]
_RTX = ["export", *_NOISE, "--out", "o", "--backend", "rtx"]
_W4 = ["--scheme", "w4a16"]
_MSE = ["--observer", "mse"]
_RECIPES = {
    "good.toml": b'model = "demo"\ngenerator = "noise"\ncount = 4\nseed = 3\n',
    "misspelt.toml": b'modle = "demo"\n',
    "malformed.toml": b"model = \n",
    "typed.toml": b'model = "demo"\ncount = "many"\n',
    "table.toml": b'model = "demo"\n[export]\ncount = 8\n',
    "no_text.toml": b"\xff\xfe",
}


@pytest.fixture
def desk(demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a bundle, a digit, and recipes good and bad."""
    shutil.copytree(demo_bundle, tmp_path / "bundle")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 28), np.uint8)).save(tmp_path / "digit.png")
    (tmp_path / "file").write_text("no folder, no image, no weights")
    for name, content in _RECIPES.items():
        (tmp_path / name).write_bytes(content)
    for variable in ("FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


_MISTAKES = {
    "a misspelt command": ["exprot"],
    "a misspelt flag": ["export", *_NOISE, "--out", "o", "--cuont", "3"],
    "a misspelt required flag": ["export", "--modle", "demo", "--out", "o"],
    "a flag too few": ["export", "--model", "demo"],
    "a flag without its value": ["export", "--out", "o", "--model"],
    "a word too many": ["export", *_NOISE, "--out", "o", "extra"],
    "no number": ["export", *_NOISE, "--out", "o", "--count", "many"],
    "no images": ["export", *_NOISE, "--out", "o", "--count", "0"],
    "a generator twice": ["export", "--model", "demo", "--generator", "noise,noise", "--out", "o"],
    "a part that begins no batch": ["export", *_NOISE, "--out", "o", "--first", "5"],
    "a part of several generators": ["export", *_NOISE[:3], "noise,dfq", "--out", "o", "--first", "32"],
    "a part for a student": ["generate", "--model", "demo", "--generator", "psaq_v2", "--out", "o", "--first", "32"],
    "a seed out of range": ["export", *_NOISE, "--out", "o", "--seed", "-1"],
    "a percentile out of range": ["export", *_NOISE, "--out", "o", "--percentile", "40"],
    "two sources of weights": ["export", *_NOISE, "--out", "o", "--checkpoint", "file", "--random-weights"],
    "more generators than images": [
        "generate",
        "--model",
        "demo",
        "--out",
        "o",
        "--count",
        "1",
        "--generator",
        "noise,psaq_v1",
    ],
    "an unknown generator": ["export", "--model", "demo", "--out", "o", "--generator", "noize"],
    "an unknown layer": ["calibrate", *_NOISE, "--count", "2", "--out", "o/plan.safetensors", "--spare", "block.1"],
    "an observer of another collector": ["calibrate", *_NOISE, "--out", "o/plan", "--collector", "ort", *_MSE],
    "an observer without a format": ["calibrate", *_NOISE, "--out", "o/plan", *_W4, *_MSE],
    "an unknown collector": ["calibrate", *_NOISE, "--out", "o/plan", "--collector", "openvino"],
    "another kind of file": ["convert", "bundle/plan.safetensors", "--to", "npz", "--out", "o"],
    "no such checkpoint": ["export", *_NOISE, "--out", "o", "--checkpoint", "nothing.safetensors"],
    "no such images": ["calibrate", *_NOISE, "--out", "o/plan.safetensors", "--calib", "nothing"],
    "a generator for images": ["calibrate", "--model", "demo", "--calib", "noise", "--out", "o/plan.safetensors"],
    "no such folder of images": ["check", "bundle", "--images", "folder:nothing"],
    "a limit of nothing": ["check", "bundle", "--limit", "0"],
    "a file for a folder": ["export", *_NOISE, "--out", "file"],
    "a folder for a file": ["generate", *_NOISE, "--count", "2", "--out", "bundle"],
    "a folder that cannot be": ["generate", *_NOISE, "--count", "2", "--out", "file/images.safetensors"],
    "no bundle": ["check", "nothing"],
    "no bundle to gate": ["gate", "nothing"],
    "a gate that lets nothing pass": ["gate", "bundle", "--max-drop", "0"],
    "a baseline that is not there": ["gate", "bundle", "--baseline", "nothing.json"],
    "a baseline that is none": ["gate", "bundle", "--baseline", "file"],
    "an update of nothing": ["gate", "bundle", "--update"],
    "a folder for the gate's tests": ["gate", "bundle", "--junit", "bundle"],
    "no bundle to analyse": ["sensitivity", "file"],
    "a chart of no format": ["sensitivity", "bundle", "--plot", "chart.bmp"],
    "a folder for numbers": ["sensitivity", "bundle", "--json", "bundle"],
    "no image": ["infer", "bundle", "file"],
    "a benchmark of nothing": ["bench", "nothing"],
    "a benchmark against itself": ["bench", "bundle", "--vs", "bundle"],
    "a benchmark of no batch": ["bench", "bundle", "--batch", "1,x"],
    "a benchmark of no call": ["bench", "bundle", "--calls", "0"],
    "a benchmark of no time": ["bench", "bundle", "--seconds", "0"],
    "a benchmark into a folder": ["bench", "bundle", "--json", "bundle"],
    "no bundle to serve": ["serve", "nothing"],
    "a port out of range": ["serve", "bundle", "--port", "65536"],
    "a name that no address has": ["serve", "bundle", "--name", "a/b"],
    "a delay too long": ["serve", "bundle", "--delay-ms", "5000"],
    "a queue for nobody": ["serve", "bundle", "--queue", "0"],
    "no threads": ["serve", "bundle", "--threads", "0"],
    "requests of nothing": ["serve", "bundle", "--max-mb", "0"],
    "no instances": ["serve-repo", "bundle", "--out", "o", "--instances", "0"],
    "a repository where something lies": ["serve-repo", "bundle", "--out", "file"],
    "a repository of no bundle": ["serve-repo", "file", "--out", "o"],
    "no provider": ["infer", "bundle", "digit.png", "--provider", "tpu"],
    "a batch out of order": ["export", *_NOISE, "--out", "o", "--batch", "8,1,32"],
    "a batch of nothing": ["export", *_NOISE, "--out", "o", "--batch", "00,1,2"],
    "a batch of too many": ["export", *_NOISE, "--out", "o", "--batch", "1,8,3000000000"],
    "a batch of letters": ["export", *_NOISE, "--out", "o", "--batch", "a,b,c"],
    "a workspace of nothing": ["export", *_NOISE, "--out", "o", "--workspace", "0"],
    "no such optimization level": ["export", *_NOISE, "--out", "o", "--optimization-level", "9"],
    "no such block": ["export", *_NOISE, "--out", "o", "--scheme", "w4a16", "--block", "48"],
    "a provider of another backend": ["export", *_NOISE, "--out", "o", "--backend", "trt", "--provider", "cuda"],
    "no such target": ["export", *_NOISE, "--out", "o", "--backend", "rtx", "--target", "sm86,sm90"],
    "a target for TensorRT": ["export", *_NOISE, "--out", "o", "--backend", "trt", "--target", "sm89"],
    "a target for ONNX Runtime": ["export", *_NOISE, "--out", "o", "--target", "sm89"],
    "a target without FP8": [*_RTX, "--scheme", "w8a8_fp8", "--target", "sm86,sm89"],
    "an asymmetric scheme for TensorRT": [*_RTX, "--scheme", "w8a8_asym"],
    "a block too small for TensorRT": ["export", *_NOISE, "--out", "o", "--backend", "trt", *_W4, "--block", "32"],
    "FP8 on a CPU": ["export", *_NOISE, "--out", "o", "--scheme", "w8a8_fp8"],
    "FP8 on a CPU, calibrated only": ["calibrate", *_NOISE, "--out", "o/plan.safetensors", "--scheme", "w8a8_fp8"],
    "INT8 on CUDA": ["export", *_NOISE, "--out", "o", "--provider", "cuda"],
    "a float16 body on a CPU": ["export", *_NOISE, "--out", "o", "--float", "fp16"],
    "a block too small for ONNX Runtime": ["export", *_NOISE, "--out", "o", *_W4, "--block", "16"],
    "an engine in INT4 throughout": ["export", *_NOISE, "--out", "o", "--scheme", "w4a4"],
    "a plan that no engine can have": ["calibrate", *_NOISE, "--out", "o/plan.safetensors", "--scheme", "w6a6"],
    "a simulation on nothing": ["simulate", *_NOISE, "--out", "o", "--scheme", "w4a4", "--images", "folder:nothing"],
    "an audit of nothing": ["audit", "nothing", "--model", "demo", "--out", "o"],
    "an audit for no model": ["audit", "file", "--out", "o"],
    "an audit of a bundle for another model": ["audit", "bundle", "--model", "demo", "--out", "o"],
    "an audit of a bundle for another size": ["audit", "bundle", "--size", "32", "--out", "o"],
    "an audit into a file": ["audit", "bundle", "--out", "file"],
    "an audit with no real images": ["audit", "bundle", "--real", "folder:nothing", "--out", "o"],
    "an audit with a limit of nothing": ["audit", "bundle", "--limit", "0", "--out", "o"],
    "an audit of ranges that are not needed": ["audit", "bundle", *_W4, "--out", "o"],
    "an audit of ranges that are found anew": ["audit", "bundle", "--scheme", "w8a8_dynamic", "--out", "o"],
    "an audit of another folder": ["audit", ".", "--out", "o"],
    "no bundle to report": ["report", "nothing"],
    "a report into a folder": ["report", "bundle", "--out", "bundle"],
    "a report beside nothing": ["report", "bundle", "--quick", "--compare", "nothing"],
    "no bundle to build": ["build", "nothing"],
    "a bundle of another placement": ["build", "bundle", "--backend", "trt"],
    "a misspelt field": ["--recipe", "misspelt.toml", "export", "--out", "o"],
    "a recipe that is not there": ["--recipe", "nothing.toml", "export", "--out", "o"],
    "a recipe that is a folder": ["--recipe", "bundle", "export", "--out", "o"],
    "a malformed recipe": ["--recipe", "malformed.toml", "export", "--out", "o"],
    "a recipe that is no text": ["--recipe", "no_text.toml", "export", "--out", "o"],
    "a wrong value in a recipe": ["--recipe", "typed.toml", "export", "--out", "o"],
    "a recipe with a table": ["--recipe", "table.toml", "export", "--out", "o"],
}


@pytest.mark.parametrize("mistake", _MISTAKES)
def test_a_mistake_is_told_in_three_lines(
    desk: Path, mistake: str, snapshot: SnapshotAssertion, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(_MISTAKES[mistake]) == 3
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    message = said.err[said.err.index("error:") :]
    assert [line.partition(":")[0] for line in message.splitlines()] == ["error", "  why", "  fix"]
    assert message == snapshot


@pytest.mark.parametrize("path", ["file", "nothing", "digit.png"])
def test_what_cannot_be_shown_is_told(desk: Path, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["show", path]) == 3
    assert f"error: `{path}` is not a whole plan" in capsys.readouterr().err


def test_a_full_disk_is_told(desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "write_images", full)
    assert cli.run(["generate", *_NOISE, "--count", "2", "--out", "images.safetensors"]) == 3
    assert "No space left on device" in capsys.readouterr().err


def test_what_nobody_foresaw_is_an_error_and_no_verdict(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("an engine's own")

    monkeypatch.setattr(pipeline, "write_images", broken)
    assert cli.run(["generate", *_NOISE, "--count", "2", "--out", "images.safetensors"]) == 3
    assert "RuntimeError: an engine's own" in capsys.readouterr().err


def test_an_unknown_model_is_told_with_names_like_it(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["export", "--model", "vit_large_patch16_225", "--out", "o"]) == 3
    said = capsys.readouterr().err
    assert "timm has no model named `vit_large_patch16_225`" in said
    assert "vit_large_patch16_224" in said


def test_a_message_shows_brackets_as_they_are(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["check", "[bold]nothing[/bold]"]) == 3
    assert "`[bold]nothing[/bold]` is not a bundle" in capsys.readouterr().err


@pytest.mark.parametrize(("verdict", "code"), [("pass", 0), ("fail", 1), ("undecided", 2)])
def test_the_exit_code_is_the_verdict(
    demo_run: tuple[Path, Check], monkeypatch: pytest.MonkeyPatch, verdict: str, code: int
) -> None:
    folder, found = demo_run
    changed = dataclasses.replace(found, verdict=verdict)  # type: ignore[arg-type]
    monkeypatch.setattr(pipeline, "_check", lambda *_, **__: changed)
    assert cli.run(["check", str(folder)]) == code
    assert cli.run(["export", *_NOISE, "--count", "8", "--refine", "none", "--out", str(folder)]) == code


def test_export_goes_on_in_a_finished_folder(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["export", *_NOISE, "--count", "8", "--refine", "none", "--out", "bundle", "--limit", "4"]) == 0
    said = capsys.readouterr()
    assert said.err.count("already done") == 4
    assert "4 of npz:held_back.npz" in said.out
    assert "bundle/report.json" in said.out


def test_generate_writes_images(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", *_NOISE, "--count", "3", "--out", "images.safetensors"]) == 0
    assert len(ImageSet.load(Path("images.safetensors"))) == 3
    said = capsys.readouterr().out
    assert "3 images" in said
    assert "contact sheet: images.png" in said


def test_calibrate_writes_a_plan_from_generated_images(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", *_NOISE, "--count", "3", "--out", "images.safetensors"]) == 0
    command = ["calibrate", "--model", "demo", "--calib", "images.safetensors", "--out", "o/plan.safetensors"]
    assert cli.run([*command, "--scheme", "w8a8_asym"]) == 0
    plan = QuantPlan.load(Path("o/plan.safetensors"))
    assert plan.scheme == "w8a8_asym"
    assert plan.images == ImageSet.load(Path("images.safetensors")).fingerprint
    assert "blocks.0.attn.qkv.input" in capsys.readouterr().out


@pytest.mark.parametrize(("level", "code"), [("good", 0), ("doubtful", 2), ("bad", 1)])
def test_audit_exits_with_its_level(desk: Path, monkeypatch: pytest.MonkeyPatch, level: str, code: int) -> None:
    monkeypatch.setattr(auditing, "judged", lambda _: ("noise", level, "made up"))
    assert cli.run(["audit", "bundle", "--out", "o"]) == code


def test_check_says_what_it_found(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["check", "bundle", "--limit", "5"]) == 0
    said = capsys.readouterr().out
    assert "5 of npz:held_back.npz" in said
    assert "engine: built\nlayers: 16 in int8, 10 in fp32\n" in said
    assert "the engine agrees with the reference" in said
    assert "pass: every layer agrees" in said


def test_bench_shows_each_batch_and_writes_the_figures(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("bundle", "other")
    command = ["bench", "bundle", "--vs", "other", "--batch", "2,1", "--calls", "8", "--json", "o/bench.json"]
    assert cli.run(command) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line.startswith(("bundle ", "other "))]
    assert [row[:3] for row in rows] == [[name, batch, "8"] for batch in "21" for name in ("bundle", "other")]
    assert "batch 2: bundle is " in said
    assert "x (" in said
    report = json.loads(Path("o/bench.json").read_text())
    assert [ratio["batch"] for ratio in report["ratios"]] == [2, 1]


def test_infer_shows_the_asked_number_of_classes(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["infer", "bundle", "digit.png", "digit.png", "--top", "2"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row for row in rows if "%" not in row] == ["digit.png", "digit.png"]
    assert len(rows) == 6


@pytest.mark.parametrize(
    ("path", "wanted"),
    [("bundle", "demo, w8a8, for ort"), ("bundle/plan.safetensors", "w8a8: 32 sites"), ("images", "synthetic:noise")],
)
def test_show_knows_each_kind_of_file(desk: Path, capsys: pytest.CaptureFixture[str], path: str, wanted: str) -> None:
    (images,) = Path("bundle/work").glob("images-*.safetensors")
    assert cli.run(["show", str(images) if path == "images" else path]) == 0
    assert wanted in capsys.readouterr().out.replace("\n", "")


def test_doctor_lists_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.run(["doctor"])
    said = capsys.readouterr().out
    findings = dfq.diagnose()
    assert code == any(finding.state == "problem" for finding in findings)
    assert all(finding.subject in said for finding in findings)


@pytest.mark.parametrize(
    ("flags", "count", "seed"), [([], 4, 3), (["--count", "2"], 2, 3), (["--count", "2", "--seed", "5"], 2, 5)]
)
def test_a_recipe_file_sets_fields_and_flags_win(desk: Path, flags: list[str], count: int, seed: int) -> None:
    assert cli.run(["--recipe", "good.toml", "generate", *flags, "--out", "images.safetensors"]) == 0
    images = ImageSet.load(Path("images.safetensors"))
    assert (len(images), images.made_by["seed"]) == (count, seed)


def test_a_recipe_file_may_stand_after_the_command(desk: Path) -> None:
    assert cli.run(["generate", "--recipe", "good.toml", "--out", "images.safetensors"]) == 0
    assert len(ImageSet.load(Path("images.safetensors"))) == 4


def test_a_recipe_file_counts_for_its_own_run_only(desk: Path) -> None:
    assert cli.run(["--recipe", "good.toml", "generate", "--out", "images.safetensors"]) == 0
    assert cli.run(["generate", "--out", "images.safetensors"]) == 3, "it needs a --model again"


def test_the_recipe_in_a_bundle_repeats_it(desk: Path) -> None:
    before = Path("bundle/model.onnx").stat().st_mtime_ns
    assert cli.run(["--recipe", "bundle/recipe.toml", "export", "--out", "bundle", "--limit", "2"]) == 0
    assert Path("bundle/model.onnx").stat().st_mtime_ns == before, "it is another recipe: the engine was made again"


def test_what_means_nothing_is_noted(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", *_NOISE, "--count", "2", "--out", "images.safetensors"]) == 0
    asked = ["--calib", "images.safetensors", "--count", "4", "--min-agreement", "98", "--refine", "none"]
    assert cli.run(["calibrate", "--model", "demo", *asked, "--out", "plan.safetensors"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "--count means nothing with --calib images.safetensors." in told
    assert "--min-agreement means nothing without --auto." in told


@pytest.mark.parametrize(
    ("calib", "wanted"),
    [("synthetic", "synthetic"), ("folder:images", "folder:{0}/images"), ("a.st,b.st", "{0}/a.st,{0}/b.st")],
)
def test_a_bundle_names_its_images_wherever_it_is_judged_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calib: str, wanted: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Recipe(model="demo", calib=calib).facts()["calib"] == wanted.format(tmp_path)


@pytest.mark.parametrize(
    ("command", "recipe"),
    [
        ("export", Recipe),
        ("calibrate", CalibrateRecipe),
        ("simulate", SimulateRecipe),
        ("generate", GenerateRecipe),
        ("audit", AuditRecipe),
        ("serve", dfq.ServeOptions),
        ("serve-repo", dfq.RepoOptions),
    ],
)
def test_the_help_of_a_command_lists_every_field(
    command: str, recipe: type, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([command, "--help"]) == 0
    said = capsys.readouterr().out
    for field in dataclasses.fields(recipe):
        assert f"--{field.name.replace('_', '-')} " in said, field.name


def test_each_command_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    said = capsys.readouterr().out
    for command in (
        "export",
        "generate",
        "calibrate",
        "audit",
        "build",
        "check",
        "gate",
        "report",
        "sensitivity",
        "simulate",
        "bench",
        "infer",
        "serve",
        "serve-repo",
        "show",
        "convert",
        "doctor",
    ):
        assert f" {command} " in said


@pytest.mark.parametrize(
    "command", [["bench"], ["gate"], ["sensitivity"], ["gate", "--junit"], ["sensitivity", "--plot"]]
)
def test_a_file_that_cannot_be_written_is_told_before_the_work(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    name, flag = (*command, "--json")[:2]
    assert cli.run([name, str(tmp_path / "no bundle"), flag, str(tmp_path / "file" / "found.svg")]) == 3
    said = capsys.readouterr().err
    assert "found.svg` cannot be written." in said
    assert f"fix: pass another file with {flag}." in said


def _process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dfq_deploy", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--version"], 0, dfq.__version__),
        (["infer", "bundle", "digit.png", "--top", "1"], 0, "%"),
        (["exprot"], 3, 'Did you mean "export"?'),
        (["infer", "bundle", "file"], 3, "is not a whole image"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_process_exits_with_the_code(desk: Path, arguments: list[str], code: int, said: str) -> None:
    done = _process(*arguments)
    assert done.returncode == code
    assert said in (done.stderr if code else done.stdout)
    assert "Traceback" not in done.stderr
    assert bool(done.stderr) == bool(code), "a result belongs on stdout, a message on stderr"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["infer", "bundle", "digit.png", "--json"], ["gate", "bundle", "--junit", "gate.xml"]]
)
def test_who_stops_reading_is_no_verdict(desk: Path, arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "dfq_deploy", *arguments]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert done.returncode == 3
    assert "error" not in done.stderr
    assert "Broken" not in done.stderr
    assert Path("gate.xml").exists() == ("gate" in arguments)


def test_the_sentences_of_a_help_flow(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["gate", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    assert "either way. The default is what 921 images can show of a good" in words
    assert cli.run(["gate", "--help"]) == 0
    lines = [line.strip("\N{BOX DRAWINGS LIGHT VERTICAL} \n") for line in capsys.readouterr().out.splitlines()]
    assert "The" not in lines
