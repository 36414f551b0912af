"""What TensorRT says while it works, kept for whoever has to explain a failure or read the layer table.

The base class of loggers belongs to the binding, so the class is made when the binding is known.
"""

from types import ModuleType
from typing import Any, Protocol

__all__ = ["Recorder", "recorder"]

_LAYER_TABLE = "Layers:"  # the builder's one message with a line per kernel


class Recorder(Protocol):
    """A logger that TensorRT takes.

    Attributes:
        messages: Severity (`INTERNAL_ERROR`, `ERROR`, `WARNING`, `INFO`, `VERBOSE`) and text, in order.
    """

    messages: list[tuple[str, str]]

    def errors(self) -> list[str]:
        """Texts of the errors so far."""
        ...

    def clear(self) -> None:
        """Forget all messages."""
        ...


def recorder(trt: ModuleType, *, verbose: tuple[str, ...] = ()) -> Recorder:
    """A logger for `trt`; of VERBOSE it keeps the layer table and what begins with one of `verbose`.

    A build writes VERBOSE by the ten thousand. The logger must outlive everything that was made with it.
    """

    class _Recorder(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[str, str]] = []

        def log(self, severity: Any, text: str) -> None:
            if severity != trt.ILogger.VERBOSE or text.startswith(verbose) or _LAYER_TABLE in text:
                self.messages.append((severity.name, text))

        def errors(self) -> list[str]:
            return [text for severity, text in self.messages if severity in ("ERROR", "INTERNAL_ERROR")]

        def clear(self) -> None:
            self.messages.clear()

    return _Recorder()
