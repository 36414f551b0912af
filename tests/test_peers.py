"""The table against other tools, without them: how results are kept, and how they read."""

from pathlib import Path
from typing import Any

from benchmarks.peers import rows as peers
from benchmarks.peers.rows import ROWS, PeerError, Row, results, table

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
    assert ours.startswith("| **dfq-deploy w8a8** | **none: 32 psaq_v1** |")
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
    home = Path(peers.__file__).parent
    for row in ROWS.values():
        assert (home / "tools" / f"{row.script}.py").is_file()
        if row.environment:
            pins = (home / "requirements" / f"{row.environment}.txt").read_text().splitlines()
            assert pins and all("==" in pin for pin in pins)
