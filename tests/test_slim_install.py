"""A plain `pip install` runs bundles: in an environment of its own, with no torch, and as large as README says."""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
_TOLERANCE = 0.15  # of the size: dependencies are not pinned
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _run(*command: str | Path, **options: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env=_ENVIRONMENT, timeout=300, **options
    )


def test_a_plain_install_runs_bundles_with_no_torch(demo_bundle: Path, tmp_path: Path) -> None:
    """One test, since the environment takes most of the time: the wheel is built, and pip gets what it asks for."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    installed = _run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", ROOT)
    assert installed.returncode == 0, installed.stderr

    (packages,) = (tmp_path / "venv" / "lib").glob("python3.*/site-packages")
    names = {path.name.lower() for path in packages.iterdir()}
    assert {"dfq_deploy", "exporters", "calibrators", "onnxruntime"} <= names
    assert not names & {"torch", "timm", "torchvision", "scipy", "matplotlib", "onnxscript", "onnxsim"}
    size = sum(file.stat().st_size for file in packages.rglob("*") if file.is_file()) / 1e6
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (told,) = re.findall(r"^pip install \. .*no torch, (\d+) MB$", readme, re.MULTILINE)
    assert size == pytest.approx(int(told), rel=_TOLERANCE)

    def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return _run(python, "-m", "dfq_deploy", *arguments, cwd=tmp_path)

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 28), np.uint8)).save(tmp_path / "digit.png")
    inferred = command("infer", demo_bundle, "digit.png", "--json", "--top", "2")
    assert (inferred.returncode, inferred.stderr) == (0, "")
    assert len(json.loads(inferred.stdout)[0]["classes"]) == 2
    benched = command("bench", demo_bundle, "--batch", "1", "--calls", "2", "--json", "bench.json")
    assert benched.returncode == 0, benched.stderr
    assert json.loads((tmp_path / "bench.json").read_text())["paces"][0]["peak_mib"] > 20
    refused = command("export", "--model", "demo", "--out", "out")
    assert refused.returncode == 3
    assert "dfq-deploy[export]" in refused.stderr
    assert "Traceback" not in refused.stderr
