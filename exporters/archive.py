"""A bundle in a zip archive: unpacked where nobody else reads, with nothing outside of that place touched.

Any tool may have zipped the folder, with it as the one top folder or without. The archive is not believed: names,
kinds and sizes of its members are looked at before the first is unpacked, and sizes once more while they are. What lies
beside the bundle's folder (macOS puts `__MACOSX` there) stays packed.
"""

import contextlib
import errno
import re
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from calibrators.errors import BundleError, DeployError
from exporters.bundle import MANIFEST

__all__ = ["bundle_folder", "is_archive"]

_MEMBERS = 4096
_DEPTH = 16  # folders in folders
_TOTAL = 2**35  # bytes unpacked, 32 GiB
_RATIO = 100  # bytes unpacked per byte of the archive; INT8 weights have hardly 2
_ALWAYS_FINE = 2**24  # bytes unpacked that no ratio forbids: much text is short when packed
_CHUNK = 2**20
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_PART = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff/\\:]+")  # of a path, on any system
_LONGEST = 255  # bytes of such a part
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)
_IMPOSSIBLE = {errno.EINVAL, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}  # places in the archive, names of members


def is_archive(path: Path) -> bool:
    """Whether `path` is called as a zip archive is, and is no folder."""
    return path.suffix.lower() == ".zip" and not path.is_dir()


@contextlib.contextmanager
def bundle_folder(path: Path) -> Iterator[Path]:
    """The folder of the bundle at `path`: that itself or, where it is a file, what it holds as a zip archive.

    An archive is unpacked into a temporary folder, which goes when the block ends; errors name the archive instead.

    Raises:
        BundleError: The file is no whole zip archive of a bundle, or holds what no bundle has.
    """
    if not path.is_file():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="dfq-deploy-") as place:
        folder = Path(place) / path.stem  # what is said of it by its name is said of the archive
        folder.mkdir()
        try:
            _unpack(path, folder)
            yield folder
        except DeployError as error:
            said = {name: getattr(error, name).replace(str(folder), str(path)) for name in ("what", "why", "fix")}
            raise type(error)(**said) from error.__cause__


def _unpack(path: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(path, archive)
            for name, member in members.items():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                _write(path, archive, member, target)
    except (*_DAMAGE, OSError) as cause:
        if isinstance(cause, OSError) and cause.errno not in _IMPOSSIBLE:
            raise  # a full disk
        raise BundleError(
            what=f"`{path}` is no bundle: it is a file, and not a whole zip archive.",
            why=f"{cause}.",
            fix="copy it again, or pass the bundle's folder.",
        ) from cause


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The files of the bundle by their place in it, after a look at everything that the archive holds."""
    members = archive.infolist()
    if len(members) > _MEMBERS:
        _refuse(path, f"holds {len(members)} members", f"a bundle has few; {_MEMBERS} are the most that are unpacked.")
    seen: set[str] = set()
    for member in members:
        _look_at(path, member)
        key = member.filename.rstrip("/").casefold()
        if key in seen:
            _refuse(path, f"holds `{member.filename}` twice", "which of them a reader takes is not said.")
        seen.add(key)
    files = {member.filename: member for member in members if not member.is_dir()}
    _look_at_sizes(path, list(files.values()))
    tops = [name.removesuffix(MANIFEST) for name in files if name.split("/")[-1] == MANIFEST and name.count("/") < 2]
    tops = [""] if "" in tops else tops
    if len(tops) != 1:
        many = "several folders hold one" if tops else f"neither it nor its top folder holds a {MANIFEST}"
        _refuse(path, "is not the archive of one bundle", f"{many}.", fix="zip the folder that the export wrote.")
    return {name.removeprefix(tops[0]): member for name, member in files.items() if name.startswith(tops[0])}


def _look_at(path: Path, member: zipfile.ZipInfo) -> None:
    """Return if the member is a file or a folder that may be unpacked."""
    name = member.filename
    parts = name.removesuffix("/").split("/")
    fine = (_PART.fullmatch(part) and part.strip(". ") and len(part.encode()) <= _LONGEST for part in parts)
    if len(parts) > _DEPTH or not all(fine):
        _refuse(path, f"holds a member called `{name}`", "such a name may lead out of the folder.")
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFDIR if member.is_dir() else stat.S_IFREG):
        _refuse(path, f"holds `{name}`, which is no plain file", "a link or a device may lead out of the folder.")
    if member.flag_bits & 0x41:
        _refuse(path, f"holds `{name}` encrypted", "bundles are signed, not encrypted.")
    if member.compress_type not in _METHODS:
        _refuse(path, f"holds `{name}` packed in an unusual way", "only stored and deflated members are unpacked.")


def _look_at_sizes(path: Path, files: list[zipfile.ZipInfo]) -> None:
    """Return if the files, by what the archive says of them, are no larger than its own size can be good for."""
    packed, total = sum(file.compress_size for file in files), sum(file.file_size for file in files)
    size = path.stat().st_size
    if packed > size:
        _refuse(path, "holds members that overlap", f"they have {packed} bytes packed, and the archive has {size}.")
    if total > _TOTAL or total > max(_ALWAYS_FINE, _RATIO * size):
        _refuse(path, f"would have {total} bytes unpacked", f"it has {size}; that is no bundle but a bomb.")


def _write(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    """Unpack one file, and no more of it than the archive says it has."""
    left = member.file_size
    with archive.open(member) as packed, target.open("xb") as file:
        while chunk := packed.read(_CHUNK):
            left -= len(chunk)
            if left < 0:
                break
            file.write(chunk)
    if left:
        _refuse(path, f"holds `{member.filename}` of another size than it says", "it is damaged, or a bomb.")


def _refuse(path: Path, fault: str, why: str, *, fix: str = "do not use it; get the bundle again.") -> NoReturn:
    raise BundleError(what=f"`{path}` {fault}.", why=why, fix=fix)
