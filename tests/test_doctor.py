"""The doctor by the versions that it finds: known faults, clashes, and what is older than the tests run with."""

import pytest

from dfq_deploy import doctor, pitfalls
from dfq_deploy.doctor import Finding, diagnose


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is installed, by package; empty until a test fills it."""
    versions: dict[str, str] = {}
    for module in (doctor, pitfalls):
        monkeypatch.setattr(module, "installed", versions.get)
    return versions


_WANTED = ["onnxruntime>=1.22", "timm>=1.0.26; extra == 'export'", "ruff>=0.9; extra == 'test'"]


def _problems() -> list[Finding]:
    return [finding for finding in diagnose() if finding.state == "problem" and "VNNI" not in finding.text]


@pytest.mark.parametrize(
    ("package", "version", "state"),
    [
        ("onnxruntime", "1.26.0", None),
        ("onnxruntime", "1.27.0", "ok"),
        ("onnxruntime", "1.31.1", "ok"),
        ("onnxruntime", "1.32.0", None),
        ("onnxruntime-gpu", "1.31.0", "ok"),
        ("tensorrt", "10.16.1.11", None),
        ("tensorrt", "11.0.0.1", "ok"),
        ("tensorrt-rtx-cu13", "1.6.0", "problem"),
        ("tensorrt-rtx-cu13", "1.7.1.116", None),
        ("nvidia-modelopt", "0.39.0", "problem"),
    ],
)
def test_a_fault_is_told_of_the_versions_that_have_it(
    found: dict[str, str], package: str, version: str, state: str | None
) -> None:
    found[package] = version
    told = [one for one in doctor._pitfalls() if one.subject == package and "older than" not in one.text]
    assert [one.state for one in told] == ([state] if state else [])
    assert all(one.text.startswith(f"{version} ") for one in told)


def test_what_is_older_than_the_oldest_tested_is_a_problem(
    found: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pitfalls, "requires", lambda _: _WANTED)
    found |= {"onnxruntime": "1.22.0", "timm": "1.0.25", "ruff": "0.1"}
    (problem,) = _problems()
    assert (problem.subject, problem.text) == (
        "timm",
        "1.0.25 is older than the tests run with: pip install 'timm>=1.0.26'",
    )


@pytest.mark.parametrize(("torch", "vision", "clash"), [("2.8.0+cpu", "0.23.0", True), ("2.8.0", "0.23.0", False)])
def test_a_torchvision_of_another_build_is_a_problem(
    found: dict[str, str], monkeypatch: pytest.MonkeyPatch, torch: str, vision: str, clash: bool
) -> None:
    monkeypatch.setattr(pitfalls, "requires", lambda _: [])
    found |= {"torch": torch, "torchvision": vision}
    assert [problem.subject for problem in _problems()] == ["torch / torchvision"] * clash
