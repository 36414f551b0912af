"""Production has no torch: what runs a bundle works where importing it, and what comes with it, fails."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dfq_deploy as dfq

# Goes before each script below. The packages are those of the extra `export`.
_BLOCK = """
import sys
from importlib.abc import MetaPathFinder

BLOCKED = {"torch", "timm", "torchvision", "scipy", "onnxscript", "onnxsim", "huggingface_hub", "matplotlib", "jinja2"}

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""
_LOADED = """
print(sorted({"torch", "timm", "torchvision", "scipy", "onnxscript"} & set(sys.modules)), file=sys.stderr)
"""


def _python(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def digit(tmp_path: Path) -> Path:
    path = tmp_path / "digit.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 28), np.uint8)).save(path)
    return path


def test_the_blocker_blocks() -> None:
    done = _python(_BLOCK + "import torch")
    assert done.returncode == 1
    assert "ModuleNotFoundError: No module named 'torch'" in done.stderr


def test_a_bundle_is_loaded_and_run_without_torch(demo_bundle: Path, digit: Path) -> None:
    script = """
import json
from PIL import Image
import dfq_deploy as dfq
with dfq.load(sys.argv[1]) as runner:
    print(json.dumps(runner(runner.preprocess(Image.open(sys.argv[2]))).tolist()))
assert not BLOCKED & set(sys.modules), BLOCKED & set(sys.modules)
"""
    done = _python(_BLOCK + script, demo_bundle, digit)
    assert (done.returncode, done.stderr) == (0, "")
    with dfq.load(demo_bundle) as runner, Image.open(digit) as image:
        np.testing.assert_array_equal(json.loads(done.stdout), runner(runner.preprocess(image)))


def test_infer_runs_without_torch(demo_bundle: Path, digit: Path) -> None:
    script = "from dfq_deploy.cli import run; code = run(['infer', *sys.argv[1:], '--top', '3'])\n"
    check = "assert not BLOCKED & set(sys.modules); sys.exit(code)"
    done = _python(_BLOCK + script + check, demo_bundle, digit)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.replace("\n", "").startswith(str(digit))
    assert done.stdout.count(" % ") == 3


def test_bench_runs_without_torch(demo_bundle: Path) -> None:
    script = "from dfq_deploy.cli import run; sys.exit(run(['bench', sys.argv[1], '--calls', '2', '--batch', '1']))"
    done = _python(_BLOCK + script, demo_bundle)
    assert done.returncode == 0, done.stderr
    assert "demo, w8a8, ort cpu" in done.stdout


@pytest.mark.parametrize("path", [".", "plan.safetensors"])
def test_show_runs_without_torch(demo_bundle: Path, path: str) -> None:
    done = _python(_BLOCK + "from dfq_deploy.cli import run; sys.exit(run(['show', sys.argv[1]]))", demo_bundle / path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "w8a8" in done.stdout


def test_what_needs_torch_says_so_without_a_traceback(tmp_path: Path) -> None:
    script = "from dfq_deploy.cli import run; sys.exit(run(['export', '--model', 'demo', '--out', sys.argv[1]]))"
    done = _python(_BLOCK + script, tmp_path / "out")
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert "dfq-deploy[export]" in done.stderr


@pytest.mark.parametrize(
    "script",
    [
        "import sys, dfq_deploy",
        "import sys, dfq_deploy; dfq_deploy.Recipe(model='demo'); dfq_deploy.load",
        "import sys, dfq_deploy; dfq_deploy.diagnose()",
        "import sys; from dfq_deploy.cli import run; run(['--help'])",
        "import sys; from dfq_deploy.cli import run; run(['export', '--help'])",
        "import sys; from dfq_deploy.cli import run; run(['exprot'])",
        "import sys; from dfq_deploy.cli import run; run(['serve', '--help'])",
        "import sys, dfq_deploy; dfq_deploy.serve, dfq_deploy.serve_repo, dfq_deploy.ServeOptions()",
        "import sys; from dfq_deploy.cli import run; run(['doctor'])",
        "import sys, dfq_deploy; dfq_deploy.ImageSetReader; dfq_deploy.convert",
    ],
    ids=lambda script: script[12:],
)
def test_what_only_looks_loads_no_torch(script: str) -> None:
    done = _python(script + _LOADED)
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == "[]"
