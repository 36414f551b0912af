"""The rows of the comparison, and their table.

A row is one tool with one of its methods on one kind of images. Its result is a JSON file that stays, so that a run
that was cut off goes on where it was and single rows can be measured again.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_LONGEST_ERROR = 160  # characters of it in the table


class PeerError(Exception):
    """A tool could not be installed, or crashed; the message is the last line of what it said."""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        key: Its name on the command line and in files.
        title: The tool and its method, for people.
        environment: Whose `requirements/NAME.txt` it needs; empty for our own environment.
        script: The file in `tools/` that does it.
        option: Which of its methods.
        images: What it calibrates on; None: it is given none.
        given: The same for people.
    """

    key: str
    title: str
    environment: str
    script: str
    option: str
    images: Literal["real", "noise", "synthetic"] | None
    given: str


_GIVEN = {"real": "128 real", "noise": "none: refuses; 32 noise"}
_ORT_STATIC = {
    "default": "ORT static, defaults",
    "minmax": "ORT static, per channel, Linear and Conv only",
    "percentile": "the same, percentile",
    "entropy": "the same, entropy",
}


def _rows() -> list[Row]:
    def pair(key: str, title: str, environment: str, script: str, option: str) -> list[Row]:
        return [
            Row(f"{key}_real", title, environment, script, option, "real", _GIVEN["real"]),
            Row(f"{key}_noise", title, environment, script, option, "noise", _GIVEN["noise"]),
        ]

    def without(key: str, title: str, environment: str, script: str, option: str, given: str = "none needed") -> Row:
        return Row(key, title, environment, script, option, None, given)

    def ours(key: str, title: str, option: str) -> Row:
        return Row(key, title, "", "ours", option, "synthetic", "**none: 32 dfq**")

    def modelopt(option: str, title: str) -> list[Row]:
        key, script = f"modelopt_{option}", "modelopt_onnx"
        return [
            Row(f"{key}_real", title, "modelopt", script, option, "real", _GIVEN["real"]),
            without(f"{key}_none", title, "modelopt", script, option, "none: draws 1 at random"),
        ]

    static = [pair(f"ort_{option}", title, "", "ort_quantizers", option) for option, title in _ORT_STATIC.items()]
    return [
        ours("ours_w8a8", "**dfq-deploy w8a8**", "w8a8"),
        ours("ours_w8a8_asym", "**dfq-deploy w8a8_asym**", "w8a8_asym"),
        without("ort_dynamic", "ORT dynamic", "", "ort_quantizers", "dynamic"),
        *(row for rows in static for row in rows),
        *pair("nncf", "NNCF, transformer", "nncf", "nncf_onnx", "transformer"),
        *modelopt("int8", "ModelOpt INT8"),
        *pair("optimum_static", "Optimum static, AVX512-VNNI", "optimum", "optimum_ort", "static"),
        without("optimum_dynamic", "Optimum dynamic, AVX512-VNNI", "optimum", "optimum_ort", "dynamic"),
        ours("ours_w4a16", "**dfq-deploy w4a16** (block 64)", "w4a16"),
        ours("ours_w4a16_32", "**dfq-deploy w4a16**, block 32", "w4a16:32"),
        without("ort_int4_rtn", "ORT INT4 weights, RTN, block 32", "", "ort_quantizers", "rtn"),
        without("ort_int4_hqq", "ORT INT4 weights, HQQ, block 32", "", "ort_quantizers", "hqq"),
        without("nncf_int4", "NNCF INT4 weights, block 32", "nncf", "nncf_onnx", "int4_sym"),
        *modelopt("int4", "ModelOpt INT4 weights, AWQ-clip, block 32"),
    ]


ROWS = {row.key: row for row in _rows()}


def results(
    rows: Iterable[Row], folder: Path, measure: Callable[[Row], Mapping[str, Any]], again: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Results of `rows` by key, those that `folder` has taken from there.

    Args:
        rows: What to measure.
        folder: Where each result is kept, in a file `KEY.json`.
        measure: Gives a row's numbers; where it raises a PeerError, that is the result.
        again: Keys of rows that are measured although they are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for row in rows:
        path = folder / f"{row.key}.json"
        if row.key in again or not path.exists():
            try:
                result = dict(measure(row))
            except PeerError as error:
                result = {"error": str(error)}
            path.write_text(json.dumps(result, indent=1), encoding="utf-8")
        found[row.key] = json.loads(path.read_text(encoding="utf-8"))
    return found


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Results by key as a Markdown table, in the order of `ROWS`."""
    titles = [
        "tool",
        "images given",
        "top-1",
        "= float",
        "MiB",
        "speed-up, batch 1 / 8",
        "calibration, CPU s",
        "peak, GiB",
    ]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for key in (key for key in ROWS if key in found):
        row, result = ROWS[key], found[key]
        cells = _failed(result["error"], len(titles) - 2) if "error" in result else _cells(result)
        lines.append("| " + " | ".join([row.title, row.given, *cells]) + " |")
    return "\n".join(lines)


def _failed(error: str, width: int) -> list[str]:
    text = error.replace("|", "\\|").replace("`", "'")[:_LONGEST_ERROR]
    return [f"fails: `{text}`", *[""] * (width - 1)]


def _cells(result: Mapping[str, Any]) -> list[str]:
    seconds = f"{result['cpu_seconds']:.0f}"
    if "generating_cpu_seconds" in result:
        seconds = f"{result['generating_cpu_seconds']:.0f} + {seconds}"
    return [
        f"{result['top1']:.2f}",
        f"{result['agreement']:.2f}",
        f"{result['mib']:.1f}",
        f"{result['speed_up_1']:.2f} / {result['speed_up_8']:.2f}",
        seconds,
        f"{result['peak_mib'] / 1024:.1f}",
    ]
