"""README's commands and examples run as they stand there; only what needs a download is put on the demo model.

`make demo` and `make test` themselves are what `.ci/run` calls.
"""

import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import numpy as np
import pytest
from PIL import Image

import dfq_deploy
from benchmarks.serving import start
from dfq_deploy.cli import app, run
from exporters.bundle import open_bundle

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_every_make_target_that_readme_names_exists() -> None:
    targets = sorted(set(re.findall(r"`make ([\w-]+)|^make ([\w-]+)$", README, re.MULTILINE)))
    names = {"".join(target) for target in targets}
    assert {"demo", "test", "bench", "accuracy", "bench-peers", "test-oldest"} <= names
    for name in names:
        subprocess.run(["make", "--dry-run", name], cwd=ROOT, check=True, capture_output=True)


def test_the_first_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = re.search(r"^    dfq-deploy (export .*)$", README, re.MULTILINE)
    assert command is not None
    arguments = command[1].replace("vit_b", "demo").split()
    _judge(run(arguments), tmp_path / "runs" / "demo")


def _judge(code: int, bundle: Path) -> None:
    """An engine that runs here passes; of one that does not, all that can be known here is right."""
    assert (bundle / "manifest.json").is_file()
    report = json.loads((bundle / "report.json").read_text())
    ran = report["ran"] == "the engine"
    assert (code, report["verdict"]) == ((0, "pass") if ran else (2, "undecided")), report["reason"]
    assert ran or "But every layer agrees" in report["reason"]


def test_the_commands_for_another_machine_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(blocks("sh")).replace("deit_t", "demo")
    export = re.findall(r"^dfq-deploy (export .*--backend rtx.*)$", lines, re.MULTILINE)
    build = re.findall(r"^dfq-deploy (build .*)$", lines, re.MULTILINE)
    assert len(export) == len(build) == 1
    _judge(run([*export[0].split(), "--generator", "noise"]), tmp_path / "runs" / "demo")
    assert run(build[0].split()) == (0 if find_spec("tensorrt_rtx") else 2)
    assert open_bundle(tmp_path / "runs" / "demo").engine.state == ("built" if find_spec("tensorrt_rtx") else "pending")


def test_the_commands_with_a_budget_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^dfq-deploy (export .*--auto.*)$", "\n".join(blocks("sh")), re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        assert run([*line.replace("deit_t", "demo").split(), "--generator", "noise"]) == 0


def test_the_command_for_layers_that_hurt_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_bundle: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "deit_t").symlink_to(demo_bundle)
    (command,) = re.findall(r"^dfq-deploy (sensitivity .*)$", "\n".join(blocks("sh")), re.MULTILINE)
    assert run(command.split()) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "sensitivity.json", "sensitivity.png"}


def test_the_commands_of_the_gate_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_bundle: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "deit_t").symlink_to(demo_bundle)
    digits = Path(dfq_deploy.__file__).parent / "models" / "demo" / "held_back.npz"
    commands = re.findall(r"^dfq-deploy (gate .*)$", "\n".join(blocks("sh")), re.MULTILINE)
    for command in commands:
        few = command.replace("folder:images", f"npz:{digits} --limit 24 --max-drop 20 --latency-band 1e6")
        assert run(few.split()) == 0, "20 points are what 24 digits can show"
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"runs", "engine.json", "gate.md", "gate.xml"}


def test_the_commands_for_a_report_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_report: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("deit_t", "small"):
        shutil.copytree(demo_report, tmp_path / "runs" / name)
    report, compare = re.findall(r"^dfq-deploy (report .*)$", "\n".join(blocks("sh")), re.MULTILINE)
    assert run(report.split()) == run(compare.split()) == 0
    assert "Report on the bundle" in (tmp_path / "runs" / "deit_t" / "report.html").read_text()
    assert "Two bundles side by side" in (tmp_path / "compare.html").read_text()


def test_the_command_for_how_fast_it_is_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_bundle: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "deit_t").symlink_to(demo_bundle)
    shutil.copytree(demo_bundle, tmp_path / "runs" / "deit_t-float")
    (command,) = re.findall(r"^dfq-deploy (bench .*--vs.*)$", "\n".join(blocks("sh")), re.MULTILINE)
    assert run([*command.split(), "--calls", "2"]) == 0
    assert len(json.loads((tmp_path / "bench.json").read_text())["ratios"]) == 2


def test_the_commands_for_an_audit_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(blocks("sh")).replace("deit_t", "demo")
    (made, audited) = re.findall(r"^dfq-deploy (generate .*|audit .*)$", lines, re.MULTILINE)
    assert run([*made.split(), "--generator", "dead_leaves", "--count", "6"]) == 0
    digits = Path(dfq_deploy.__file__).parent / "models" / "demo" / "held_back.npz"
    assert run(audited.replace("folder:photographs", f"npz:{digits}").split()) in (0, 1, 2)
    assert {"audit.json", "ranges.png", "patch_similarity.png", "attention.png"} <= {
        path.name for path in (tmp_path / "runs" / "audit").iterdir()
    }


def test_the_command_for_fewer_bits_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(blocks("sh")).replace("deit_t", "demo")
    (command,) = re.findall(r"^dfq-deploy (simulate .*)$", lines, re.MULTILINE)
    assert run([*command.split(), "--generator", "noise", "--count", "8", "--limit", "32"]) == 0
    report = json.loads((tmp_path / "runs" / "demo-w4a4" / "report.json").read_text())
    assert (report["scheme"], report["n"]) == ("w4a4", 32)
    assert report["agreement"]["percent"] > 80


def test_the_command_that_compares_generators_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"^dfq-deploy (bench generators .*)$", "\n".join(blocks("sh")), re.MULTILINE)
    digits = np.load(Path(dfq_deploy.__file__).parent / "models" / "demo" / "held_back.npz")
    np.savez(tmp_path / "val.npz", images=digits["images"][:40], labels=digits["labels"][:40])
    np.savez(tmp_path / "train.npz", images=digits["images"][40:80])
    here = (
        command.replace("deit_t", "demo").replace("folder:val", "npz:val.npz").replace("folder:train", "npz:train.npz")
    )
    few = ["--generators", "noise", "--schemes", "w4a4", "--refine", "none", "--seeds", "0", "--count", "4"]
    assert run([*here.split(), *few]) == 0
    made = {path.name for path in (tmp_path / "runs" / "generators").iterdir()}
    assert {"generators.json", "generators.md", "generators.png"} <= made


def test_the_commands_for_serving_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_bundle: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "deit_t").symlink_to(demo_bundle)
    (repository,) = re.findall(r"^dfq-deploy (serve-repo .*)$", "\n".join(blocks("sh")), re.MULTILINE)
    assert run(repository.split()) == 0
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == [
        "deit_t",
        "deit_t_encoded",
        "deit_t_preprocess",
    ]
    if which("curl") is None:
        pytest.skip("curl is not installed")
    (block,) = (block for block in blocks("sh") if block.startswith("dfq-deploy serve "))
    command, _, client = block.partition("\n")
    server = start(tmp_path / "runs" / "deit_t", name=command.split()[-1])
    try:
        Image.new("RGB", (40, 50)).save(tmp_path / "photo.jpg")
        asked = ["bash", "-c", client.replace(":8000/", f":{server.port}/")]
        (output,) = json.loads(subprocess.run(asked, check=True, capture_output=True).stdout)["outputs"]
    finally:
        server.stop()
    assert [text.count(":") for text in output["data"]] == [2, 2, 2]


def test_the_commands_for_a_signed_bundle_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "deit_t").symlink_to(demo_bundle)
    Image.new("RGB", (40, 50)).save("cat.jpg")
    lines = "\n".join(blocks("sh"))
    keys = re.findall(r"^(openssl .*)$", lines, re.MULTILINE)
    commands = re.findall(r"^dfq-deploy ((?:pack|infer) .*)$", lines, re.MULTILINE)
    assert (len(keys), len(commands)) == (2, 2)
    for line in keys:
        subprocess.run(line.split(), check=True, capture_output=True)
    for line in commands:
        assert run(line.split()) == 0
    assert "cat.jpg" in capsys.readouterr().out
    assert not (demo_bundle / "manifest.sig").exists()


def test_every_command_and_flag_that_readme_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    commands = set(re.findall(r"`dfq-deploy ([\w-]+)", README))
    assert {name for name in app if not name.startswith("-")} <= commands
    for command in commands:
        assert app[command] is not None
        for below in app[command]:
            assert below.startswith("-") or f"`dfq-deploy {command} {below}" in README
            run([command, below, "--help"])
    for command in commands:
        run([command, "--help"])
    helped = capsys.readouterr().out
    flags = set(re.findall(r"`(--[a-z-]+)", README)) - {"--help"}
    assert len(flags) > 5
    assert {flag for flag in flags if flag not in helped} == set()


def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_bundle: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(demo_bundle)
    export, production = blocks("python")
    assert "dfq.export(" in export
    exec(export.replace('out="runs/demo"', 'out="runs/again"'), {})
    names = {"pil_images": [Image.new("RGB", (40, 50)), Image.new("L", (8, 8))]}
    exec(production, names)
    assert names["logits"].shape == (2, 10)


def test_the_plan_file_is_specified_as_it_is_written(demo_bundle: Path) -> None:
    from safetensors import safe_open

    with safe_open(demo_bundle / "plan.safetensors", "numpy") as file:
        assert list(file.metadata()) == ["dfq_plan"]
        assert {name.rpartition(".")[2] for name in file.keys()} == {"scale", "zero_point"}  # noqa: SIM118
    for field in ("format", "sites", "spared", "scheme", "model", "images"):
        assert f"`{field}`" in README
