"""A bundle as one file: a zip archive with what the manifest vouches for, and the same bytes for the same bundle.

Comes after a check, before the bundle is sent to where it will run; `load` takes the archive as it takes the folder.
"""

import zipfile
from pathlib import Path

from calibrators.errors import BundleError
from calibrators.files import is_plain_file, written_whole
from exporters.archive import bundle_folder
from exporters.bundle import MANIFEST, open_bundle
from exporters.signing import SIGNATURE, signer

__all__ = ["pack"]

_WHEN = (1980, 1, 1, 0, 0, 0)  # the least that a zip archive can say
_MODE = 0o100644  # a plain file that all may read
_CHUNK = 2**20


def pack(
    folder: str | Path, out: str | Path, *, sign: str | Path | None = None, verify: str | Path | None = None
) -> None:
    """Write the bundle in `folder` to the zip archive `out`: the files of the manifest, it, its signature, the report.

    Members are stored as they are: weights in few bits hardly shrink, and what a compressor puts out depends on its
    version. The folder stays as it is.

    Args:
        folder: A bundle, or an archive of one.
        out: The file to write, .zip.
        sign: PEM file with the private key that signs the manifest in the archive; None: its signature stays, if it
            has one.
        verify: PEM file with the public key that it must be signed with.

    Raises:
        BundleError: The bundle is incomplete or altered, or not signed with that key.
        RecipeError: A key cannot be read.
    """
    out = Path(out)
    if out.suffix.lower() != ".zip":
        raise BundleError(
            what=f"`{out}` is not called as an archive is.",
            why="commands tell one by the end of its name.",
            fix="pass a file that ends in .zip with --out.",
        )
    signs = None if sign is None else signer(sign)
    with bundle_folder(Path(folder)) as opened:
        manifest = open_bundle(opened, verify=verify)
        names = {*manifest.files, MANIFEST, SIGNATURE, "report.json"}
        with written_whole(out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for name in sorted(name for name in names if is_plain_file(opened / name)):
                if name != SIGNATURE or signs is None:
                    _add(archive, name, opened / name)
            if signs is not None:
                archive.writestr(_member(SIGNATURE), signs((opened / MANIFEST).read_bytes()))


def _member(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name, _WHEN)
    member.create_system = 3  # Unix, wherever it is written
    member.external_attr = _MODE << 16
    return member


def _add(archive: zipfile.ZipFile, name: str, path: Path) -> None:
    member = _member(name)
    member.file_size = path.stat().st_size  # beyond 2 GiB it is written otherwise
    with path.open("rb") as file, archive.open(member, "w") as packed:
        while chunk := file.read(_CHUNK):
            packed.write(chunk)
