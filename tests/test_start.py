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
    """numpy, pydantic and the command line are half a second; each of these is as much again, or many times that."""
    loaded = subprocess.run([sys.executable, "-c", _LOADED], check=True, capture_output=True, text=True).stdout.split()
    assert {"cyclopts", "dfq_deploy"} <= set(loaded)
    slow = {"fastapi", "jinja2", "matplotlib", "onnx", "onnx_ir", "onnxruntime", "onnxsim", "pandas", "ray", "scipy"}
    assert set(loaded) & (slow | {"tensorrt", "tensorrt_rtx", "timm", "torch", "torchmetrics", "transformers"}) == set()


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
