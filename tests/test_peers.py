"""The table against other tools, without them: how results are kept, and how they read."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.peers.rows import ROWS, PeerError, Row, results, table
from benchmarks.peers.run import run
from exporters.bundle import open_bundle

HOME = Path(__file__).parent.parent / "benchmarks" / "peers"

NUMBERS = {
    "top1": 78.391,
    "agreement": 97.61,
    "mib": 7.2,
    "speed_up_1": 1.891,
    "speed_up_8": 1.8,
    "seconds": 99.0,
    "cpu_seconds": 61.4,
    "peak_mib": 1331.0,
}


def test_a_table_has_a_line_per_result_in_the_order_of_the_rows() -> None:
    found = {
        "nncf_real": {"error": "no wheel for `a|b`" + 200 * "."},
        "ort_dynamic": NUMBERS,
        "ours_w8a8": NUMBERS | {"generating_seconds": 300.0, "generating_cpu_seconds": 180.2},
    }
    ours, dynamic, nncf = table(found).splitlines()[2:]
    assert ours.startswith("| **dfq-deploy w8a8** | **none: 32 dfq** |")
    assert ours.endswith("| 78.39 | 97.61 | 7.2 | 1.89 / 1.80 | 180 + 61 | 1.3 |")
    assert dynamic == "| ORT dynamic | none needed | 78.39 | 97.61 | 7.2 | 1.89 / 1.80 | 61 | 1.3 |"
    assert nncf.startswith("| NNCF, transformer | 128 real | fails: `no wheel for 'a\\|b'...")
    assert {line.replace("\\|", "").count("|") for line in (ours, dynamic, nncf)} == {9}
    assert len(nncf) < 300


def test_what_was_measured_is_kept_and_a_crash_is_a_result(tmp_path: Path) -> None:
    measured: list[str] = []

    def measure(row: Row) -> dict[str, Any]:
        measured.append(row.key)
        if row.key == "nncf_real":
            message = "killed by signal 9"
            raise PeerError(message)
        return NUMBERS

    rows = [ROWS[key] for key in ("ort_dynamic", "nncf_real")]
    first = results(rows, tmp_path, measure)
    assert first == {"ort_dynamic": NUMBERS, "nncf_real": {"error": "killed by signal 9"}}
    assert results([*rows, ROWS["ours_w8a8"]], tmp_path, measure) == first | {"ours_w8a8": NUMBERS}
    assert measured == ["ort_dynamic", "nncf_real", "ours_w8a8"]
    results(rows, tmp_path, measure, again=["nncf_real"])
    assert measured[3:] == ["nncf_real"]


def test_every_row_has_its_script_and_its_pinned_environment() -> None:
    for row in ROWS.values():
        assert (HOME / "tools" / f"{row.script}.py").is_file()
        if row.environment:
            pins = (HOME / "requirements" / f"{row.environment}.txt").read_text().splitlines()
            assert pins and all("==" in pin for pin in pins)


def test_what_a_process_said_last_is_its_error(tmp_path: Path) -> None:
    for program, error in {
        "print('a', flush=True); raise SystemExit('b')": "b",
        "import os; os.kill(os.getpid(), 9)": "killed by signal 9",
    }.items():
        with pytest.raises(PeerError, match=f"^{error}$"):
            run([sys.executable, "-c", program], tmp_path / "log")


def test_a_tool_and_the_judge_work_together(demo_bundle: Path, tmp_path: Path) -> None:
    (kept,) = (demo_bundle / "work").glob("float-*.onnx")
    floats = Path(shutil.copy(kept, tmp_path))
    made, facts, images, labels = (tmp_path / name for name in ("made.onnx", "facts.json", "images.npy", "labels.npy"))
    tool = [sys.executable, HOME / "tools" / "ort_quantizers.py", "--float-onnx", floats, "--option", "dynamic"]
    run([*tool, "--out", made, "--facts", facts], tmp_path / "log")
    told = json.loads(facts.read_text())
    assert told["cpu_seconds"] > 0 and told["peak_mib"] > 10
    assert set(told["versions"]) == {"onnxruntime", "onnx"}
    shape = open_bundle(demo_bundle).preprocess.shape
    np.save(images, np.random.default_rng(0).normal(size=(9, *shape)).astype(np.float32))
    np.save(labels, np.arange(9))
    judge = [sys.executable, HOME / "measure.py", "--float-onnx", floats, "--images", images, "--labels", labels]
    for quantized, agreement in ((floats, 100.0), (made, 50.0)):
        run([*judge, "--quantized", quantized, "--facts", facts], tmp_path / "log")
        judged = json.loads(facts.read_text())
        assert judged["n"] == 9
        assert judged["agreement"] >= agreement
        assert judged["mib"] == quantized.stat().st_size / 2**20
