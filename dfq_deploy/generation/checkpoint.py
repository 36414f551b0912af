"""A file with the state of a loop of image synthesis, so that a run that was killed goes on where it was.

Tensors come in by name, and the same tensors come out of a later run: the images at the end are the same to the bit. A
loop's is written once a minute, whole or not at all; what is short is not worth a file.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibrators.files import written_whole

__all__ = ["Checkpoint", "give_adam", "save_state"]

_SECONDS = 60.0  # between two writes


class Checkpoint:
    """The state of one loop.

    Args:
        path: The file, which need not be there yet. None: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._written = time.monotonic()

    def load(self) -> Mapping[str, Tensor]:
        """What an earlier run left, on the host; empty if there is nothing."""
        return load_file(self._path) if self._path is not None and self._path.exists() else {}

    def keep(self, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """Write `state`, if the last write is long ago."""
        if self._path is None or time.monotonic() - self._written < _SECONDS:
            return
        save_state(self._path, state())
        self._written = time.monotonic()


def give_adam(adam: torch.optim.Adam, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
    """Have `adam` go on with `parameter` from `state`, as it was in an earlier run; it counts its steps on the host."""
    adam.state[parameter] = {
        name: value if name == "step" else value.to(parameter.device) for name, value in state.items()
    }


def save_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors by name, whole or not at all."""
    with written_whole(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, temporary)
