"""A bundle in a zip archive: read as the folder is, or refused with nothing left behind."""

import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_bundle import tiny_bundle

import dfq_deploy as dfq
from calibrators.errors import BundleError
from dfq_deploy.cli import run
from exporters import archive
from exporters.bundle import MANIFEST

DIGITS = f"npz:{Path(dfq.__file__).parent / 'models' / 'demo' / 'held_back.npz'}"


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where archives are unpacked; what stays there was left behind."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundle")


def _digit(path: Path) -> Path:
    Image.fromarray(np.full((5, 5), 200, np.uint8)).save(path)
    return path


def _logits(path: Path) -> list[float]:
    with dfq.load(path) as runner:
        found: list[float] = runner(np.ones((1, 1, 4, 4), np.float32))[0].tolist()
        return found


def _by_hand(bundle: Path, out: Path, top: str) -> Path:
    """An archive as another tool would write it: folders as members, deflated, in the folder's order."""
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        if top:
            packed.mkdir(top)
            packed.writestr("__MACOSX/._bundle", b"resource fork")
        for file in bundle.iterdir():
            packed.write(file, f"{top}{file.name}")
    return out


@pytest.mark.parametrize("top", ["", "bundle/"])
def test_an_archive_of_any_tool_answers_as_the_folder_does(
    bundle: Path, tmp_path: Path, scratch: Path, top: str
) -> None:
    packed = _by_hand(bundle, tmp_path / "b.zip", top)
    assert _logits(packed) == _logits(bundle)
    assert list(scratch.iterdir()) == []


def test_what_is_unpacked_stays_until_the_runner_is_closed(bundle: Path, tmp_path: Path, scratch: Path) -> None:
    dfq.pack(bundle, tmp_path / "b.zip")
    runner = dfq.load(tmp_path / "b.zip")
    (unpacked,) = scratch.iterdir()
    assert (unpacked / "b" / MANIFEST).is_file()
    assert stat.S_IMODE(unpacked.stat().st_mode) == 0o700
    runner.close()
    assert list(scratch.iterdir()) == []


def test_the_same_bundle_gives_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    (bundle / "report.json").write_text("{}")
    dfq.pack(bundle, tmp_path / "one.zip")
    elsewhere = shutil.copytree(bundle, tmp_path / "elsewhere")
    for file in elsewhere.iterdir():
        os.utime(file, (1, 1))
        file.chmod(0o600)
    (elsewhere / "work").mkdir()
    (elsewhere / "work" / "images.png").write_bytes(b"0" * 999)
    (elsewhere / "notes.txt").write_text("no part of the bundle")
    dfq.pack(elsewhere, tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as packed:
        names = ["classes.txt", MANIFEST, "model.onnx", "plan.safetensors", "report.json"]
        assert packed.namelist() == names
    dfq.pack(tmp_path / "one.zip", tmp_path / "three.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "three.zip").read_bytes()


def test_an_altered_bundle_is_not_packed(bundle: Path, tmp_path: Path) -> None:
    (bundle / "classes.txt").write_text("a\nb\nc\n")
    with pytest.raises(BundleError, match="altered"):
        dfq.pack(bundle, tmp_path / "b.zip")
    with pytest.raises(BundleError, match="is not called as an archive is"):
        dfq.pack(bundle, tmp_path / "b.tar")
    assert not list(tmp_path.glob("b.*"))


def test_the_commands_take_an_archive(
    demo_bundle: Path, tmp_path: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "b.zip"
    assert run(["pack", str(demo_bundle), "--out", str(packed)]) == 0
    assert "SHA-256" in capsys.readouterr().out
    assert run(["infer", str(packed), str(_digit(tmp_path / "digit.png")), "--top", "1"]) == 0
    assert run(["show", str(packed)]) == 0
    assert "for ort" in capsys.readouterr().out
    before = packed.read_bytes()
    assert run(["check", str(packed), "--limit", "4"]) == 0
    assert "report:" not in capsys.readouterr().out
    assert run(["sensitivity", str(packed), "--limit", "2"]) == 0
    assert run(["audit", str(packed), "--out", str(tmp_path / "audit")]) == 3
    assert "calibrated on are gone" in capsys.readouterr().err
    assert run(["bench", str(packed), "--batch", "1", "--calls", "2"]) == 0
    assert run(["gate", str(packed), "--images", DIGITS, "--limit", "4"]) == 2
    assert "undecided: " in capsys.readouterr().out
    assert run(["report", str(packed), "--quick"]) == 3
    assert "name a file with --out" in capsys.readouterr().err
    page = tmp_path / "page.html"
    assert run(["report", str(packed), "--quick", "--out", str(page), "--compare", str(demo_bundle)]) == 0
    for text in (capsys.readouterr().out, page.read_text()):
        assert str(scratch) not in text
        assert "b/work" in text
    assert run(["build", str(packed)]) == 3
    assert "unpack it" in capsys.readouterr().err
    assert packed.read_bytes() == before
    assert list(scratch.iterdir()) == []


def _member(name: str, mode: int = 0) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.create_system = 3
    member.external_attr = mode << 16
    return member


def _with(*members: tuple[str | zipfile.ZipInfo, bytes]) -> Callable[[Path], None]:
    def add(path: Path) -> None:
        with zipfile.ZipFile(path, "a") as packed:
            for member, content in members:
                packed.writestr(member, content)

    return add


def _patched(old: bytes, new: bytes) -> Callable[[Path], None]:
    """Other bytes in each place of the archive, both headers of a member among them."""

    def patch(path: Path) -> None:
        content = path.read_bytes()
        assert content.count(old) >= 2, "the name is in the local header and in the directory"
        path.write_bytes(content.replace(old, new))

    return patch


def _flagged(path: Path) -> None:
    """The first member's bit for encryption set in both of its headers."""
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


def _larger_than_it_says(path: Path) -> None:
    """A member of a megabyte of zeros that says, in both headers, that it has ten bytes."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("zeros", bytes(2**20))
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<I", 2**20), struct.pack("<I", 10)))


def _bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("zeros", bytes(2**25))


def _overlapping(path: Path) -> None:
    """A hundred entries of the directory that share the bytes of one member."""
    content = path.read_bytes()
    with zipfile.ZipFile(path) as packed:
        member = next(m for m in packed.infolist() if m.filename == "model.onnx")
        start = packed.start_dir
    entries = b""
    for number in range(100):
        name = f"m{number:02}".encode()
        sizes = (member.CRC, member.compress_size, member.file_size, len(name))
        fields = (20, 20, 0, 0, 0, 33, *sizes, 0, 0, 0, 0, 0, member.header_offset)
        entries += struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *fields) + name
    directory, end = content[start:-22], content[-22:]
    total = int.from_bytes(end[10:12], "little") + 100
    record = struct.pack("<4s4H2IH", end[:4], 0, 0, total, total, len(directory) + len(entries), start, 0)
    path.write_bytes(content[:start] + directory + entries + record)


def _once(path: Path) -> None:
    """A name changed in the member's own header only."""
    content = path.read_bytes()
    path.write_bytes(content.replace(b"classes.txt", b"classes.tx_", 1))


_ATTACKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a path up": (_with(("../evil", b"")), "called `../evil`"),
    "a path up, within": (_with(("work/../../evil", b"")), "called `work/../../evil`"),
    "a path up on Windows": (_with((_member("x\\..\\evil"), b"")), "called `x"),
    "an absolute path": (_with(("/tmp/evil", b"")), "called `/tmp/evil`"),
    "a drive": (_with(("C:evil", b"")), "called `C:evil`"),
    "a name of dots": (_with(("...", b"")), "called `...`"),
    "an empty name": (_with(("work//x", b"")), "called `work//x`"),
    "a terminal's escape": (_with(("\x1b[2J", b"")), r"called `\x1b[2J`"),
    "a name too long": (_with(("n" * 300, b"")), "called `nnn"),
    "folders without end": (_with(("/".join("d" * 20), b"")), "called `d/d/"),
    "a link": (_with((_member("evil", stat.S_IFLNK | 0o777), b"/etc/passwd")), "`evil`, which is no plain file"),
    "a pipe": (_with((_member("evil", stat.S_IFIFO | 0o644), b"")), "`evil`, which is no plain file"),
    "a device": (_with((_member("evil", stat.S_IFCHR | 0o644), b"")), "`evil`, which is no plain file"),
    "a folder for a file": (_with((_member("evil", stat.S_IFDIR | 0o755), b"")), "`evil`, which is no plain file"),
    "the same name twice": (_with(("report.json", b"1"), ("report.json", b"2")), "`report.json` twice"),
    "the same name in capitals": (_with(("report.json", b"1"), ("Report.json", b"2")), "`Report.json` twice"),
    "a file as a folder": (_with(("model.onnx/x", b"")), "not a whole zip archive"),
    "too many members": (_with(*((f"work/{n}", b"") for n in range(5000))), "members"),
    "an encrypted member": (_flagged, "encrypted"),
    "a bomb": (_bomb, "bytes unpacked"),
    "a bomb that says it is none": (_larger_than_it_says, "not a whole zip archive"),
    "members that overlap": (_overlapping, "overlap"),
    "a manifest by another name": (_patched(b"manifest.json", b"manifest.jsox"), "not the archive of one bundle"),
    "another name in the directory": (_once, "not a whole zip archive"),
    "no archive": (lambda path: path.write_bytes(b"PK\x03\x04"), "not a whole zip archive"),
    "nothing": (lambda path: path.write_bytes(b""), "not a whole zip archive"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("attack", _ATTACKS)
def test_an_archive_that_no_bundle_has_is_refused_with_nothing_left(
    bundle: Path, tmp_path: Path, scratch: Path, attack: str
) -> None:
    path = tmp_path / "b.zip"
    dfq.pack(bundle, path)
    change, said = _ATTACKS[attack]
    change(path)
    before = {file for file in tmp_path.rglob("*") if scratch not in file.parents}
    with pytest.raises(BundleError) as caught:
        dfq.load(path)
    assert said in caught.value.what
    assert str(path) in caught.value.what
    assert len(str(caught.value).splitlines()) == 3
    assert list(scratch.iterdir()) == []
    assert {file for file in tmp_path.rglob("*") if scratch not in file.parents} == before


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_only_what_every_tool_packs_is_unpacked(bundle: Path, tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "b.zip", "w", method) as packed:
        for file in bundle.iterdir():
            packed.write(file, file.name)
    with pytest.raises(BundleError, match="packed in an unusual way"):
        dfq.load(tmp_path / "b.zip")


def test_two_bundles_in_one_archive_are_refused(bundle: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as packed:
        for top in ("a", "b"):
            for file in bundle.iterdir():
                packed.write(file, f"{top}/{file.name}")
    with pytest.raises(BundleError, match="not the archive of one bundle") as caught:
        dfq.load(tmp_path / "b.zip")
    assert "several folders" in caught.value.why


def test_the_total_has_a_limit_that_no_ratio_lifts(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dfq.pack(bundle, tmp_path / "b.zip")
    monkeypatch.setattr(archive, "_TOTAL", 1000)
    with pytest.raises(BundleError, match="bytes unpacked"):
        dfq.load(tmp_path / "b.zip")


def test_an_error_names_the_archive_and_not_where_it_was_unpacked(bundle: Path, tmp_path: Path, scratch: Path) -> None:
    facts = json.loads((bundle / MANIFEST).read_text())
    facts["files"]["classes.txt"] = "0" * 64
    (bundle / MANIFEST).write_text(json.dumps(facts))
    path = _by_hand(bundle, tmp_path / "b.zip", "bundle/")
    with pytest.raises(BundleError) as caught:
        dfq.load(path)
    assert caught.value.what == f"`{path}/classes.txt` is altered."
    assert str(scratch) not in str(caught.value)


def test_zip_itself_makes_an_archive_that_is_read(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "zipfile", "-c", "b.zip", "bundle/"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert _logits(tmp_path / "b.zip") == _logits(bundle)


def test_a_stream_is_no_archive(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "b.zip")
    with pytest.raises(BundleError, match="is not a bundle"):
        dfq.load(tmp_path / "b.zip")
