"""The run folder: what is already done, and that nobody else works in it.

A stage's result is a file whose name carries a fingerprint of everything that it depends on. If the file is there,
the stage is done: files appear under their name only when they are whole. What depends on something else by now is
deleted when its successor has been made.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from calibrators.errors import RecipeError
from calibrators.files import clear_unfinished, fingerprint_of, written_whole
from exporters.bundle import MANIFEST

__all__ = ["Workspace", "held", "held_file", "refuse_bundle"]


@contextlib.contextmanager
def held(out: Path) -> Iterator[Path]:
    """The folder `work` of the run folder `out`, which nobody else writes to until the block ends.

    Raises:
        RecipeError: Somebody does, or the folder cannot be written to.
    """
    folder = out / "work"
    path = folder / ".lock"
    lock = _locked(path, f"working in `{out}`", out, "folder")
    try:
        yield folder
    finally:
        if [*folder.glob("*")] == [path]:  # a bundle from elsewhere, which has no stages
            path.unlink()  # filelock sees that, should somebody else be about to lock it
            lock.release()
            with contextlib.suppress(OSError):
                folder.rmdir()
        else:
            lock.release()


@contextlib.contextmanager
def held_file(out: Path) -> Iterator[None]:
    """The file `out`, which nobody else makes until the block ends.

    Raises:
        RecipeError: Somebody does, or it cannot be written.
    """
    path = out.with_name(f".{out.name}.lock")
    lock = _locked(path, f"writing `{out}`", out, "file")
    try:
        yield
    finally:
        path.unlink()
        lock.release()


def refuse_bundle(out: Path) -> None:
    """Return if no bundle lies in `out`, whose report and finished stages other work there would replace.

    Raises:
        RecipeError: One does.
    """
    if (out / MANIFEST).exists() and (out / "model.onnx").exists():
        raise RecipeError(
            what=f"`{out}` holds a bundle.",
            why="what is made there would replace its report, its plan or what it keeps in `work`.",
            fix="use another --out.",
        )


def _locked(path: Path, doing: str, out: Path, kind: str) -> FileLock:
    """The lock at `path`, which is taken from now on."""
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as cause:
        raise RecipeError(
            what=f"another run is {doing}.",
            why=f"two runs in one {kind} would overwrite each other.",
            fix=f"wait for it, or use another {kind}.",
        ) from cause
    except OSError as cause:
        raise RecipeError(what=f"`{out}` cannot be written to.", why=str(cause), fix=f"use another {kind}.") from cause
    return lock


class Workspace:
    """The folder `out/work`, held by one run at a time.

    Args:
        out: The run folder.
        announce: Told each stage's name and whether its result was there already.
        others: Folder of other run folders: what one of them has finished is taken from there. None: there is none.
    """

    def __init__(self, out: Path, announce: Callable[[str, bool], None], others: Path | None = None) -> None:
        self._out = out
        self._announce = announce
        self._others = others
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "Workspace":
        self._folder = self._held.enter_context(held(self._out))
        clear_unfinished(self._folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def stage(self, name: str, suffix: str, facts: object, make: Callable[[Path], None]) -> Path:
        """The file with the result of stage `name`, made by `make` unless it is there.

        Args:
            name: The stage, for people and in the file's name.
            suffix: Of the file, `.safetensors`.
            facts: JSON-serialisable; everything that the result depends on.
            make: Writes the result to the path it is given, whole or not at all.
        """
        path = self._folder / f"{name}-{fingerprint_of(facts)[:16]}{suffix}"
        if path.exists():
            self._announce(name, True)
        else:
            borrowed = self._borrowed(path)
            self._announce(name, borrowed)
            if not borrowed:
                make(path)
            for stale in self._folder.glob(f"{name}-*"):
                if stale.name.startswith(path.stem):  # it, and what goes with it
                    continue
                if stale.is_dir():  # batches of a run that was killed
                    shutil.rmtree(stale)
                else:
                    stale.unlink()
        return path

    def _borrowed(self, path: Path) -> bool:
        """Whether another run has the result, which then is here, too, with the files that go with it."""
        for other in sorted(self._others.glob(f"*/work/{path.name}")) if self._others else ():
            with contextlib.suppress(FileNotFoundError):  # that run goes on, and has just deleted it
                for file in sorted(other.parent.glob(f"{path.stem}*"), key=lambda file: file == other):
                    if file.is_file():
                        with written_whole(path.with_name(file.name)) as temporary:
                            shutil.copyfile(file, temporary)
                return True
        return False
