"""The documentation site builds, strictly, and its commands run, page by page and in order, as they stand there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

import dfq_deploy as dfq
from dfq_deploy.cli import run

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
_HERE = {"export": ["--generator", "noise"], "gate": ["--latency-band", "1000"]}  # what is quick, and needs no quiet
_OWN_WEIGHTS = ["--count", "8", "--refine", "none", "--spare", "none"]  # of a larger model than the demo's
_ON_A_CLUSTER = "--ray "  # run in tests/test_ray.py, which has one


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [line for line in "".join(blocks).splitlines() if _ON_A_CLUSTER not in line]


def test_a_cluster_is_asked_for_on_one_page_only() -> None:
    asked = {page.stem for page in PAGES if _ON_A_CLUSTER in page.read_text(encoding="utf-8")}
    assert asked == {"scale"}, "tests/test_ray.py runs the commands of that page"


def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    pages = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    assert {page.stem for page in PAGES} - {"index"} <= pages
    for page in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(
            r'(?:<script[^>]*src|<link[^>]*rel="stylesheet"[^>]*href|<img[^>]*src)="(https?:[^"]*)', page.read_text()
        )
        assert not fetched, page


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    told = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for name in dfq.__all__ if not name.startswith("__")} <= {path.rpartition(".")[2] for path in told}


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    digit = np.kron(np.eye(8), np.ones((4, 4)))
    Image.fromarray((255 * digit).astype(np.uint8)).save("digit.png")
    if any("--checkpoint weights.safetensors" in line for line in commands(page)):
        save_file(timm.create_model("deit_tiny_patch16_224").state_dict(), "weights.safetensors")
    for name, text in re.findall(r"```toml title=\"(\S+)\"\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        Path(name).write_text(text, encoding="utf-8")
    for line in commands(page):
        program, *arguments = shlex.split(line)
        if program == "dfq-deploy":
            more = _OWN_WEIGHTS if "--checkpoint" in arguments else []
            # 2: an engine that does not run here is undecided
            assert run([*arguments, *_HERE.get(arguments[0], []), *more]) in (0, 2), line
        else:
            assert program == "pip", line
