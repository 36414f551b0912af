"""The command line: the commands gathered, recipes read from files, errors said.

Errors come out as three lines; the exit code is 0 for pass, 1 for fail, 2 for undecided and 3 for a wrong call or an
error.
"""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import Parameter
from cyclopts.help import DefaultFormatter, HelpPanel
from rich.console import Console, ConsoleOptions
from rich.text import Text

import dfq_deploy as dfq
from calibrators.errors import DeployError
from dfq_deploy.commands import gating, judging, looking, making, running, serving, sweeping
from dfq_deploy.commands.bench import bench
from dfq_deploy.messages import notes_in_one_line, print_error
from dfq_deploy.recipe_file import fields_in

__all__ = ["app", "run"]

_ERROR = 3


class _Flowing(DefaultFormatter):
    """Help whose sentences flow: a docstring's line ends are no part of them."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """Show one panel."""
        for entry in panel.entries:
            text = getattr(entry.description, "primary_renderable", None)
            if isinstance(text, Text):
                text.plain = " ".join(text.plain.split())
        super().__call__(console, options, panel)


app = cyclopts.App(
    name="dfq-deploy",
    help="Quantize a vision transformer with no data, build its engine, and prove what the engine computes.",
    version=dfq.__version__,
    help_format="plaintext",
    help_formatter=_Flowing(),
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # `run` says it in three lines
)
app.meta.suppress_keyboard_interrupt = False  # which cyclopts does not pass on
for _command in (
    making.export,
    sweeping.sweep,
    making.generate,
    making.calibrate,
    judging.audit,
    making.build,
    judging.check,
    gating.gate,
    judging.sensitivity,
    making.simulate,
    running.infer,
    looking.report,
    serving.serve,
    serving.serve_repo,
    looking.show,
    looking.convert,
    looking.doctor,
    making.pack,
    bench,
):
    app.command(_command)


@app.meta.default
def _with_recipe(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    recipe: Annotated[Path | None, Parameter(help="TOML file with the same fields as the flags; flags win.")] = None,
) -> int:
    app.config = ()
    if recipe is not None:
        app.config = cyclopts.config.Dict(fields_in(recipe), source=str(recipe), use_commands_as_keys=False)
    result: int = app(tokens, exit_on_error=False, print_error=False)
    return result


def run(arguments: list[str]) -> int:
    """Run one command; returns its exit code, and prints nothing but messages whatever the input."""
    try:
        with notes_in_one_line():
            result = app.meta(arguments, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except cyclopts.CycloptsError as wrong:
        return _told(str(wrong), "the command line does not read.", "see dfq-deploy --help, or --help after a command.")
    except DeployError as error:
        return _told(error.what, error.why, error.fix)
    except (BrokenPipeError, SystemExit):  # rich makes of the former an exit with 1, which here means fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it ends
        return _ERROR
    except OSError as error:
        return _told(f"{error}.", "the file system refused it.", "check the path, its permissions and the free space.")
    except KeyboardInterrupt:
        return _told("stopped.", "you interrupted the run.", "run the same command again: finished stages are kept.")
    except Exception:  # what nobody foresaw: Python itself would exit with 1, which here means fail
        traceback.print_exc()
        return _ERROR
    return result if isinstance(result, int) else 0


def _told(what: str, why: str, fix: str) -> int:
    print_error(what, why, fix)
    return _ERROR
