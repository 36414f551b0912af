"""The command as installed: under its name, loading little to answer, and quiet when it is interrupted at once."""

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points

from dfq_deploy.__main__ import main


def test_the_command_is_installed_under_its_name() -> None:
    (found,) = (script for script in entry_points(group="console_scripts") if script.name == "dfq-deploy")
    start: Callable[[], None] = found.load()
    assert start is main


_LOADED = """
import contextlib, io, sys

sys.argv = ["dfq-deploy", "--help"]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    from dfq_deploy.__main__ import main
    main()
print(*{name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names))
"""


def test_help_loads_nothing_that_takes_long() -> None:
    """Of other packages only these: they are half a second together, torch alone is several."""
    loaded = subprocess.run([sys.executable, "-c", _LOADED], check=True, capture_output=True, text=True).stdout.split()
    ours = {"calibrators", "dfq_deploy", "exporters"}
    command_line = {"attr", "attrs", "cyclopts", "docstring_parser", "rich", "tomli_w"}
    types = {"annotated_types", "pydantic", "pydantic_core", "typing_extensions", "typing_inspection"}
    arrays = {"PIL", "array_api_compat", "ml_dtypes", "numpy", "safetensors"}
    others = {name for name in loaded if not name.startswith("_")} - ours - {"sitecustomize", "usercustomize"}
    assert {"cyclopts", "dfq_deploy"} <= set(loaded)
    assert others <= command_line | types | arrays


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
