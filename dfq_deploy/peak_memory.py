"""How much memory an engine takes: the most that a process of its own ever held that loads it and answers one batch.

`python -m dfq_deploy.peak_memory` is that process; it prints one number. The kernel keeps the high-water mark, of the
interpreter and all libraries too, since whoever runs the engine has these as well. What a GPU holds is not in it.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

from calibrators.errors import BackendError, DeployError
from dfq_deploy.machine import memory_held
from dfq_deploy.runtime import load

__all__ = ["peak_mib"]


def peak_mib(folder: Path, batch: int, *, provider: str | None = None, threads: int | None = None) -> float | None:
    """MiB of memory for the bundle in `folder` and a batch of `batch`; None where the system does not say (Linux does).

    Raises:
        BackendError: The process failed, or was ended for the memory that it took.
    """
    if not memory_held()[1]:
        return None
    arguments = [str(folder), str(batch), provider or "", "" if threads is None else str(threads)]
    command = [sys.executable, "-m", "dfq_deploy.peak_memory", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if ended.returncode:
        said = ended.stderr.strip().splitlines()
        raise BackendError(
            what=f"a process of its own could not run `{folder}` with a batch of {batch}.",
            why=f"it ended with {ended.returncode}: {said[-1] if said else 'it said nothing.'}",
            fix="pass a smaller --batch, or free some memory.",
        )
    return float(ended.stdout)


def _main(folder: str, batch: str, provider: str, threads: str) -> None:
    with load(folder, provider=provider or None, threads=int(threads) if threads else None) as runner:
        runner(np.zeros((int(batch), *runner.manifest.preprocess.shape), np.float32))
        sys.stdout.write(str(memory_held()[1]))


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except DeployError as error:
        sys.exit(error.what)
