"""A tenth of the families of timm in docs/coverage.md, another one for each commit: none computes anything wrong."""

import subprocess
from pathlib import Path

import pytest

from benchmarks.coverage import measure, tenth

_ROOT = Path(__file__).parent.parent
_PAGE = _ROOT / "docs" / "coverage.md"


def _commit() -> str:
    asked = ["git", "-C", str(_ROOT), "rev-parse", "HEAD"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "0"  # of an archive without its history


@pytest.mark.parametrize("model", tenth(_commit()).values())
def test_a_family_is_exported_and_agrees_or_is_refused_with_a_reason(model: str, tmp_path: Path) -> None:
    found = measure(model, tmp_path / model)
    if "verdict" in found:
        assert found["verdict"] in ("pass", "undecided"), found["reason"]
        assert found["parity"] < 1e-4
        assert found["sites"] > 0
    else:
        assert found["why"]
        assert found["fix"]
        (row,) = (line for line in _PAGE.read_text(encoding="utf-8").splitlines() if f"| `{model}` |" in line)
        assert "| refused (" in row, f"the page says that it is exported: {row}"
