"""The command as it is installed: under its name, quick to answer, and quiet when it is interrupted at once."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points

from dfq_deploy.__main__ import main


def test_the_command_is_installed_under_its_name() -> None:
    (found,) = (script for script in entry_points(group="console_scripts") if script.name == "dfq-deploy")
    start: Callable[[], None] = found.load()
    assert start is main


def _cpu_seconds(*arguments: str) -> float:
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
    return spent() - before


def test_help_costs_less_than_half_a_second_more_than_python_itself() -> None:
    bare = min(_cpu_seconds("-c", "pass") for _ in range(3))
    assert min(_cpu_seconds("-m", "dfq_deploy", "--help") for _ in range(3)) - bare < 0.5


_INTERRUPTED = """
import sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == "cyclopts":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
from dfq_deploy.__main__ import main
main()
"""


def test_whoever_interrupts_it_while_it_loads_sees_no_traceback() -> None:
    found = subprocess.run([sys.executable, "-c", _INTERRUPTED], check=False, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (3, "")
    assert [line.partition(":")[0] for line in found.stderr.splitlines()] == ["error", "  why", "  fix"]
