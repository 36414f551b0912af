"""The one family of errors that is raised on purpose, each saying what, why and how to fix it.

Whoever raises knows the facts; whoever prints (the command line) only prints. Nothing here knows either.
"""

from collections.abc import Callable
from functools import partial

__all__ = [
    "BackendError",
    "BundleError",
    "CalibrationWarning",
    "DeployError",
    "ExportError",
    "ImagesError",
    "LargeImageError",
    "ModelError",
    "NotHereError",
    "PlanError",
    "RecipeError",
]


class CalibrationWarning(UserWarning):
    """The result can be had, but calibration images or settings make it worse than it could be."""


class DeployError(Exception):
    """A failure that the reader can act on; `str()` gives the three lines that are shown.

    Line breaks in a part, such as those of another library's message, become spaces; what else is no text, such as a
    terminal's escape in the name of a file, is spelled out.

    Attributes:
        what: What could not be done, with the names and numbers involved.
        why: The reason, as far as it is known.
        fix: What to do next, with the flag or command spelt out.
    """

    def __init__(self, *, what: str, why: str, fix: str) -> None:
        self.what, self.why, self.fix = (_one_line(part) for part in (what, why, fix))
        super().__init__(self.what)

    def __reduce__(self) -> tuple[Callable[[], "DeployError"], tuple[()]]:
        """As which it comes from another process."""
        return partial(type(self), what=self.what, why=self.why, fix=self.fix), ()

    def __str__(self) -> str:
        return f"{self.what}\n  why: {self.why}\n  fix: {self.fix}"


def _one_line(text: str) -> str:
    spelled = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.replace("\n", " "))
    return "".join(spelled)


class RecipeError(DeployError):
    """A run was described in a way that cannot be carried out."""


class ModelError(DeployError):
    """A model or its weights could not be loaded."""


class ImagesError(DeployError):
    """Calibration or evaluation images are missing, broken or of the wrong shape."""


class LargeImageError(ImagesError):
    """A picture has more pixels than are let in."""


class PlanError(DeployError):
    """Ranges or a plan are unusable, or belong to another model."""


class ExportError(DeployError):
    """The ONNX graph could not be made, or is not what the plan asks for."""


class BackendError(DeployError):
    """A run-time is missing, or cannot run this plan."""


class NotHereError(BackendError):
    """What would run this is not on this machine: a GPU, a driver, a run-time."""


class BundleError(DeployError):
    """A bundle is incomplete, altered or of another format."""
