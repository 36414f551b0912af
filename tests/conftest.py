"""What several tests need: a finished demo bundle, and where the real weights and images lie."""

import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads that spin starve child processes

import pytest

import dfq_deploy as dfq
from calibrators.errors import BackendError
from dfq_deploy.evaluate import Check
from dfq_deploy.models import Model
from dfq_deploy.models.loading import load_model
from exporters.tensorrt import cuda


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, saying why; what takes longest comes first, so that no worker ends with it."""
    items.sort(key=lambda item: "imagenet" not in item.keywords)
    if _data() is None:
        for item in items:
            if "imagenet" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="DFQ_DATA names no folder with weights/ and imagenet_val/"))
    lack = _lacks_gpu()
    for item in items:
        if lack and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=lack))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many of the bundles that drifted the gate caught."""
    reports = [report for key in ("passed", "failed") for report in terminalreporter.getreports(key)]
    seen = [value for report in reports for name, value in report.user_properties if name == "gate mutation"]
    for mode in sorted({mode for _, mode, _, _ in seen}):
        of = [(what, caught, ran) for what, mode_of, caught, ran in seen if mode_of == mode]
        missed = ", ".join(what for what, caught, _ in of if not caught)
        terminalreporter.write_line(
            f"gate, {mode}: {sum(caught for _, caught, _ in of)} of {len(of)} mutations caught, "
            f"{sum(ran for _, _, ran in of)} by what was run alone; missed: {missed or 'none'}"
        )


def _lacks_gpu() -> str:
    """What keeps the tests marked `gpu` from running here; empty if nothing does."""
    try:
        cuda.require()
    except Exception as error:  # bindings that do not fit the machine raise what they like
        return error.why if isinstance(error, BackendError) else str(error)
    return ""


def _data() -> Path | None:
    named = os.environ.get("DFQ_DATA", "")
    return Path(named).resolve() if named and (Path(named) / "imagenet_val" / "labels.csv").is_file() else None


@pytest.fixture(scope="session")
def imagenet() -> Path:
    """The folder with real weights and real images."""
    found = _data()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def demo() -> Model:
    """The demo model; a module's tests share it and leave it as it is."""
    return load_model("demo")


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Check]:
    """A demo bundle calibrated on noise, with weights as they are, and its check on the held-back digits.

    Copy the folder before changing it.
    """
    folder = tmp_path_factory.mktemp("demo") / "bundle"
    return folder, dfq.export(dfq.Recipe(model="demo", generator="noise", count=8, refine="none"), folder)


@pytest.fixture(scope="session")
def demo_bundle(demo_run: tuple[Path, Check]) -> Path:
    """The folder of `demo_run`."""
    return demo_run[0]


@pytest.fixture(scope="session")
def demo_report(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `demo_bundle`, called `run`, of which a report was made that has all it can have."""
    folder = tmp_path_factory.mktemp("reports") / "run"
    shutil.copytree(demo_bundle, folder)
    assert not dfq.report(folder).missing
    return folder
