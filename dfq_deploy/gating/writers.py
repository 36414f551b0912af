"""A gate's result for machines and people: JUnit XML for what shows test results, Markdown for a job's summary."""

from pathlib import Path
from typing import TYPE_CHECKING

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from calibrators.files import write_text, written_whole

if TYPE_CHECKING:  # a result is told by this file
    from dfq_deploy.gating.result import GateResult

__all__ = ["write_junit", "write_markdown"]

_SUITE = "dfq-deploy gate"


def write_junit(found: "GateResult", path: Path) -> None:
    """Write a test case per check: `fail` is a failure, `undecided` an error, a check that was left out is skipped."""
    suite = TestSuite(_SUITE)
    suite.add_property("bundle", _printable(found.bundle))
    suite.add_property("verdict", found.verdict)
    suite.add_property("mode", found.mode)
    suite.add_property("images", found.told)
    suite.add_property("smallest_detectable_drop_pt", f"{found.detectable:.4g}")
    for check in found.checks:
        case = TestCase(check.name, classname=_SUITE)
        if check.verdict == "fail":
            case.result = [Failure(_printable(check.reason))]
        elif check.verdict == "undecided":
            case.result = [Error(_printable(check.reason))]
        else:
            case.system_out = _printable(check.reason)
        suite.add_testcase(case)
    for name, why in found.left_out.items():
        case = TestCase(name, classname=_SUITE)
        case.result = [Skipped(_printable(why))]
        suite.add_testcase(case)
    whole = JUnitXml(_SUITE)
    whole.add_testsuite(suite)
    with written_whole(path) as temporary:
        whole.write(str(temporary), pretty=True)


def write_markdown(found: "GateResult", path: Path) -> None:
    """Write the result as a Markdown file."""
    write_text(path, _markdown(found))


def _markdown(found: "GateResult") -> str:
    """The result as GitHub's and GitLab's Markdown."""
    lines = [
        f"### {found.verdict}: quantized engine, {_cell(found.bundle)}",
        "",
        f"{found.told}.",
        "",
        "| check | verdict | value | limit | 95 % interval | |",
        "|---|---|---|---|---|---|",
    ]
    for check in found.checks:
        low, high = check.interval
        ends = f"{low:.4g} to {high:.4g}" if low != high else ""
        lines.append(
            f"| {check.name} | **{check.verdict}** | {_figure(check.value)} | {_figure(check.limit)} | {ends} "
            f"| {_cell(check.reason)} |"
        )
    lines += [f"| {name} | left out | | | | {_cell(why)} |" for name, why in found.left_out.items()]
    return "\n".join([*lines, "", *([f"{found.power}.", ""] if found.power else [])])


def _figure(value: float) -> str:
    """Four digits that count, and of a number with more before the point all of these."""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def _cell(text: str) -> str:
    return _printable(text).replace("|", "\\|").replace("\n", " ")


def _printable(text: str) -> str:
    """`text` without the control characters that XML cannot hold."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
