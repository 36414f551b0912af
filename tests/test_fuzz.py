"""Whatever the bytes, a reader gives what they say or refuses in three lines: no traceback, and nothing in part.

The corpus is made here: each kind of file whole, its header with any value changed for any other, and its bytes
changed, cut and repeated. What is read must be of use: every number that a later stage takes from it is taken.
"""

import copy
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_bundle import PREPROCESS, tiny_bundle, tiny_plan

import dfq_deploy as dfq
from calibrators.errors import DeployError
from calibrators.images import ImageSet
from calibrators.plan import QuantPlan
from calibrators.ranges import Ranges, SiteRange
from calibrators.student import Student
from exporters.bundle import MANIFEST, Manifest, open_bundle

_FEW = settings(max_examples=200, deadline=None, suppress_health_check=[*HealthCheck], database=None)
_ODD = [None, True, False, -1, 0, 1, 2, 2**31, 2**63, -(2**70), 0.5, 1e999, -1e999, float("nan"), "", "1", "\x1b[2J"]
_ODD += ["\ud800", "../x", "model.onnx", "x" * 5000, [], {}, [[]], [1], {"": None}, {"format": 1}, "0" * 64, "a\nb"]
_values = st.sampled_from(_ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@st.composite
def _changed(draw: st.DrawFn, whole: Any) -> Any:
    """A JSON value with up to three of its parts changed for others, taken out, renamed or added."""
    facts = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        spots = list(_spots(facts))
        if not spots:
            return copy.deepcopy(draw(_values))
        holder, key = draw(st.sampled_from(spots))
        action = draw(st.sampled_from(["change", "change", "change", "take out", "rename", "add"]))
        if action == "take out":
            del holder[key]
        elif isinstance(holder, dict) and action == "rename":
            holder[draw(st.text(max_size=12))] = holder.pop(key)
        elif isinstance(holder, dict) and action == "add":
            holder[draw(st.text(max_size=12))] = copy.deepcopy(draw(_values))
        else:
            holder[key] = copy.deepcopy(draw(_values))
    return facts


def _spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value that holds another one."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield value, key
        yield from _spots(part)


@st.composite
def _damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes with some of them changed, cut out or repeated."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(content) - 1, 0)))
        end = start + draw(st.sampled_from([1, 1, 2, 4, 16, 10**9]))
        action = draw(st.sampled_from(["set", "set", "set", "cut", "repeat"]))
        if action == "cut":
            del content[start:end]
        elif action == "repeat":
            content[start:start] = content[start:end]
        else:
            new = draw(st.binary(min_size=1, max_size=4) | st.sampled_from([b"\xff\xff\xff\xff", b"PK\x01\x02", b"\0"]))
            content[start : start + len(new)] = new
    return bytes(content)


def _read(read: Callable[[], Any]) -> Any:
    """What a reader gives, or None where it refuses in three lines that can be printed."""
    try:
        return read()
    except DeployError as error:
        lines = str(error).splitlines()
        assert [line[:7] for line in lines[1:]] == ["  why: ", "  fix: "], lines
        assert str(error).encode().isascii() or str(error).replace("\n", "").isprintable()
        return None


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("fuzz") / "bundle")


@pytest.fixture(scope="module")
def packed(bundle: Path) -> bytes:
    dfq.pack(bundle, bundle.with_name("b.zip"))
    return bundle.with_name("b.zip").read_bytes()


def _use_manifest(manifest: Manifest | None, whole: Manifest) -> None:
    """What every command takes from a manifest; its files are those that were hashed."""
    if manifest is None:
        return
    assert {name: manifest.files[name] for name in ("model.onnx", "plan.safetensors")}.items() <= whole.files.items()
    json.dumps(manifest.model_dump(mode="json"))
    assert manifest.preprocess.shape
    assert all(np.isfinite(bound).all() for bound in manifest.preprocess.bounds)
    assert manifest.engine.options.batch[2] >= 1
    assert [manifest.images[key] for key in ("source", "fingerprint")]
    manifest.engine.report()


@given(data=st.data())
@_FEW
def test_any_manifest_is_read_or_refused(bundle: Path, data: st.DataObject) -> None:
    path = bundle / MANIFEST
    text = path.read_bytes()
    whole = open_bundle(bundle)
    try:
        path.write_text(json.dumps(data.draw(_changed(json.loads(text)))))
        _use_manifest(_read(lambda: open_bundle(bundle)), whole)
        path.write_bytes(data.draw(_damaged(text)))
        _use_manifest(_read(lambda: open_bundle(bundle)), whole)
    finally:
        path.write_bytes(text)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 10**5,
        b'{"a":' * 10**5,
        b"9" * 10**5,
        b'{"format":1e999}',
        "{}".encode("utf-16"),
        b"\xef\xbb\xbf{}",
        b"\0",
    ],
    ids=lambda content: content[:8].hex(),
)
def test_json_that_is_hard_on_parsers_is_refused(bundle: Path, tmp_path: Path, content: bytes) -> None:
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    (folder / MANIFEST).write_bytes(content)
    assert _read(lambda: open_bundle(folder)) is None
    text = content.decode("latin-1")
    for kind, load in (("dfq_plan", QuantPlan.load), ("dfq_ranges", Ranges.load), ("dfq_imageset", ImageSet.load)):
        save_file({"pixels": np.zeros((1, 1, 4, 4), np.float32)}, tmp_path / "file", {kind: text})
        assert _read(lambda load=load: load(tmp_path / "file")) is None  # type: ignore[misc]


def _use_plan(plan: QuantPlan | None) -> None:
    if plan is None:
        return
    assert len(plan.fingerprint) == 64
    for name, q in plan.sites.items():
        assert name
        if q.block is None and (q.axis is None or q.axis < 2):
            q.along(2)
    for text in (*plan.spared.values(), plan.scheme, plan.model, plan.images):
        text.encode()


def _use_ranges(ranges: Ranges | None) -> None:
    for seen in ranges.sites.values() if ranges else ():
        assert seen.low.shape == seen.high.shape
        assert np.prod(seen.shape) >= 0
        seen.role.encode()


def _use_images(images: ImageSet | None) -> None:
    if images is None:
        return
    assert images.pixels[:1].shape[1:] == images.preprocess.shape
    assert images.labels is None or (len(images.labels) == len(images) and images.labels.dtype.kind == "i")
    assert [len(batch) for batch in images.batches(2)]
    images.spread(1)
    json.dumps(dict(images.made_by))


def _plan_file(path: Path) -> None:
    tiny_plan().save(path)


def _ranges_file(path: Path) -> None:
    sites = {
        "head.input": SiteRange(np.float32(-1), np.float32(2), "input", None, (16,)),
        "head.weight": SiteRange(np.float32([-1, 0, 1]), np.float32([1, 1, 1]), "weight", 0, (3, 16)),
    }
    Ranges(sites, "m" * 64, "i" * 64, "minmax").save(path)


def _images_file(path: Path) -> None:
    pixels = np.random.default_rng(0).uniform(-1, 1, (3, 1, 4, 4)).astype(np.float32)
    student = Student({"head.weight": np.zeros((3, 2), np.float32)}, "m" * 64, "w8a8")
    labels = np.array([0, 1, 2])
    made_by = {"generator": "psaq_v2", "seed": 0, "count": 3}
    ImageSet.of(pixels, PREPROCESS, source="s", labels=labels, made_by=made_by, student=student).save(path)


_READERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any], Callable[[Any], None]]] = {
    "dfq_plan": (_plan_file, QuantPlan.load, _use_plan),
    "dfq_ranges": (_ranges_file, Ranges.load, _use_ranges),
    "dfq_imageset": (_images_file, ImageSet.load, _use_images),
}
_SHAPES = st.sampled_from([(), (0,), (1,), (2,), (3,), (3, 2), (1, 1, 4, 4), (3, 1, 4, 4), (0, 1, 4, 4)])
_KINDS = st.sampled_from([np.float32, np.float64, np.float16, np.int8, np.uint8, np.int64, np.bool_])


@pytest.mark.parametrize("kind", _READERS)
@given(data=st.data())
@_FEW
def test_any_header_and_any_tensors_are_read_or_refused(kind: str, data: st.DataObject) -> None:
    make, load, use = _READERS[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.safetensors"
        path.write_bytes(_made_by(make))
        tensors = load_file(path)
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from(sorted(tensors)))
            values = st.sampled_from([0, 1, -1, 0.5, np.nan, np.inf])
            with np.errstate(invalid="ignore"):
                tensors[name] = np.full(data.draw(_SHAPES), data.draw(values)).astype(data.draw(_KINDS))
        header = data.draw(_changed(_header(path, kind)))
        save_file(tensors, path, {kind: json.dumps(header)})
        use(_read(lambda: load(path)))


@pytest.mark.parametrize("kind", _READERS)
@given(data=st.data())
@_FEW
def test_any_bytes_are_read_or_refused(kind: str, data: st.DataObject) -> None:
    make, load, use = _READERS[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.safetensors"
        path.write_bytes(data.draw(_damaged(_made_by(make))))
        use(_read(lambda: load(path)))


@functools.cache
def _made_by(make: Callable[[Path], object]) -> bytes:
    """The file that `make` writes."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()


def _header(path: Path, kind: str) -> Any:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(json.loads(content[8 : 8 + length])["__metadata__"][kind])


@given(data=st.data())
@_FEW
def test_any_archive_is_read_whole_or_refused(packed: bytes, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path, scratch = Path(folder) / "b.zip", Path(folder) / "scratch"
        scratch.mkdir()
        patch.setattr(tempfile, "tempdir", str(scratch))
        path.write_bytes(data.draw(_damaged(packed)))
        runner = _read(lambda: dfq.load(path))
        if runner is not None:
            images = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
            np.testing.assert_allclose(runner(images), [[77.5, 80.0, 82.5]], rtol=1e-6)
            assert runner.classes in (None, ["nought", "one", "two"])
            runner.close()
        assert list(scratch.iterdir()) == []
        assert {file.name for file in Path(folder).iterdir()} == {"b.zip", "scratch"}
