"""Files that are whole or absent, and what identifies their content.

Every artefact is written beside its final name and moved there when it is complete, so that a killed run
never leaves a half-written file under a name that another run would read.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from calibrators.errors import RecipeError

__all__ = [
    "clear_unfinished",
    "fingerprint_of",
    "folder_written_whole",
    "is_plain_file",
    "sha256_of",
    "writable",
    "write_json",
    "write_text",
    "written_whole",
]

_UNFINISHED = ".writing-"


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path in `path`'s folder that becomes `path` when the block ends without an exception.

    Files that the block writes beside it (ONNX's external data) are moved along, before it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_UNFINISHED) as folder:
        temporary = Path(folder) / path.name
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors would leave files private
        yield temporary
        for written in sorted(Path(folder).iterdir(), key=lambda file: file == temporary):
            with written.open("rb+") as file:
                os.fsync(file.fileno())
            written.chmod(mode)
            written.replace(path.parent / written.name)


def writable(path: Path, flag: str = "--out") -> Path:
    """`path`, which can become a file: found out before anyone waits for what goes into it.

    Args:
        path: The file; its folder is made.
        flag: Where the user named it.

    Raises:
        RecipeError: It cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    except OSError as cause:
        raise RecipeError(
            what=f"`{path}` cannot be written.", why=f"{cause}.", fix=f"pass another file with {flag}."
        ) from cause
    return path


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: object) -> None:
    """Write `value` as a JSON file that people can read, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, where nothing may be yet, that becomes `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_UNFINISHED) as holder:
        temporary = Path(holder) / path.name
        temporary.mkdir()
        yield temporary
        temporary.rename(path)


def clear_unfinished(folder: Path) -> None:
    """Delete what a killed run left half-written in `folder`; nobody else may be writing there."""
    for left in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(left)


def is_plain_file(path: Path) -> bool:
    """Whether there is a file at `path` itself: no link, pipe, folder or device."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_of(facts: object) -> str:
    """Hexadecimal SHA-256 of JSON-serialisable facts, the same whatever the order of their keys."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
