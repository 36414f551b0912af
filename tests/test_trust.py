"""Nothing leads out of a bundle and nothing in it is a pickle; what today's versions write is read by later ones."""

import ast
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tiny_bundle import PREPROCESS, sealed, tiny_bundle, tiny_model, tiny_plan

import dfq_deploy as dfq
from calibrators.errors import BundleError, ExportError, ImagesError, PlanError
from calibrators.images import ImageSet
from calibrators.plan import QuantPlan
from calibrators.ranges import Ranges
from dfq_deploy.cli import run
from dfq_deploy.gating.baseline import Baseline
from exporters.bundle import MANIFEST, open_bundle, unseal_bundle

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "format-1"
_FILES = ["model.onnx", "plan.safetensors", "classes.txt"]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundle")


def _link(path: Path) -> None:
    """The same content, elsewhere."""
    path.rename(path.parent.with_name(path.name))
    path.symlink_to(path.parent.with_name(path.name))


def _link_within(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to("other")


def _dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


_KINDS = {"link": _link, "link within": _link_within, "dangling link": _dangling_link, "pipe": _pipe, "folder": _folder}


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("name", _FILES)
def test_what_is_no_plain_file_is_refused_by_its_name(bundle: Path, name: str, kind: str) -> None:
    _KINDS[kind](bundle / name)
    with pytest.raises(BundleError, match=rf"{name}` is no plain file"):
        dfq.load(bundle)


@pytest.mark.parametrize("kind", _KINDS)
def test_a_manifest_that_is_no_plain_file_is_none(bundle: Path, kind: str) -> None:
    _KINDS[kind](bundle / MANIFEST)
    with pytest.raises(BundleError, match="is not a bundle"):
        dfq.load(bundle)


def test_the_folder_itself_may_be_a_link(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(bundle)
    dfq.load(tmp_path / "current").close()


def test_a_pipe_for_a_report_holds_nothing_up(bundle: Path, tmp_path: Path) -> None:
    os.mkfifo(bundle / "report.json")
    dfq.pack(bundle, tmp_path / "b.zip")
    with pytest.raises(ExportError, match="in float"):  # which is asked after the report is read
        dfq.build(bundle)


def test_classes_that_are_no_text_are_refused(bundle: Path) -> None:
    for content in (b"\xff\n1\n2\n", b"one\ntwo\n", b"a\n\x1b[2J\nb\n"):
        (bundle / "classes.txt").write_bytes(content)
        sealed(bundle, _FILES)
        with pytest.raises(BundleError, match="does not name the classes"):
            dfq.load(bundle)


def _in_a_branch(model: onnx.ModelProto, location: str) -> None:
    """External data of a constant in a graph within a node."""
    inner = TensorProto(name="c", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    inner.external_data.add(key="location", value=location)
    constant = helper.make_node("Constant", [], ["c"], value=inner)
    branch = helper.make_graph([constant], "b", [], [helper.make_tensor_value_info("c", 1, [1])])
    condition = helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("yes", 9, [], [True]))
    model.graph.node.extend([condition, helper.make_node("If", ["yes"], ["i"], then_branch=branch, else_branch=branch)])


def _in_a_weight(model: onnx.ModelProto, location: str) -> None:
    (weight,) = model.graph.initializer
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)


def _in_a_function(model: onnx.ModelProto, location: str) -> None:
    inner = TensorProto(name="c", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    inner.external_data.add(key="location", value=location)
    node = helper.make_node("Constant", [], ["c"], value=inner)
    model.functions.append(helper.make_function("local", "f", [], ["c"], [node], [helper.make_opsetid("", 20)]))


@pytest.mark.parametrize("place", [_in_a_weight, _in_a_branch, _in_a_function])
@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "secret", "./model.onnx.data", "a/../../secret", ""])
def test_weights_outside_the_bundle_are_not_read(
    bundle: Path, place: Callable[[onnx.ModelProto, str], None], location: str
) -> None:
    for folder in (bundle, bundle.parent):
        (folder / "secret").write_bytes(bytes(192))
    model = tiny_model()
    place(model, location)
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    sealed(bundle, _FILES)
    with pytest.raises(BundleError, match="wants weights from") as caught:
        dfq.load(bundle)
    assert f"`{location}`" in caught.value.what


def test_weights_beside_the_model_are_read(bundle: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(2, 1, 4, 4)).astype(np.float32)
    with dfq.load(bundle) as runner:
        wanted = runner(images)
    onnx.save(tiny_model(), bundle / "model.onnx", save_as_external_data=True, location="model.onnx.data",
              size_threshold=0)  # fmt: skip
    sealed(bundle, [*_FILES, "model.onnx.data"])
    dfq.pack(bundle, tmp_path / "b.zip")
    for path in (bundle, tmp_path / "b.zip"):
        with dfq.load(path) as runner:
            np.testing.assert_array_equal(runner(images), wanted)
    sealed(bundle, _FILES)
    with pytest.raises(BundleError, match=r"wants weights from `model\.onnx\.data`"):
        dfq.load(bundle)


_RUNS_CODE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def test_no_code_of_ours_reads_or_writes_a_pickle() -> None:
    """Imports of what pickles, `torch.load`, `np.load` without its guard."""
    found = []
    for package in ("calibrators", "exporters", "dfq_deploy"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                given = {k.arg: ast.unparse(k.value) for k in node.keywords} if isinstance(node, ast.Call) else {}
                wrong = _RUNS_CODE & {name.partition(".")[0] for name in names}
                wrong |= {call} & {"torch.load", "torch.save", "eval", "exec"}
                wrong |= {call} if given.get("allow_pickle") == "True" else set()
                wrong |= {call} if given.get("weights_only") == "False" else set()
                found += [f"{file.name}:{node.lineno}: {name}" for name in wrong]  # type: ignore[attr-defined]
    assert found == []


def test_a_bundle_with_a_pickle_for_a_plan_runs_nothing(bundle: Path) -> None:
    crater = bundle.with_name("crater")
    bomb = b"cos\nsystem\n(S'touch " + str(crater).encode() + b"'\ntR."
    for name in ("plan.safetensors", "model.onnx"):
        (bundle / name).write_bytes(bomb)
    sealed(bundle, _FILES)
    assert run(["infer", str(bundle), "nothing.png"]) == 3
    assert run(["show", str(bundle / "plan.safetensors")]) == 3
    assert not crater.exists()


def test_a_bundle_of_format_1_is_read() -> None:
    with dfq.load(GOLDEN / "bundle.zip") as runner:
        assert (runner.manifest.format, runner.manifest.model.name) == (1, "tiny")
        assert runner.classes == ["nought", "one", "two"]
        images = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
        np.testing.assert_allclose(runner(images), [[77.5, 80.0, 82.5]], rtol=1e-6)


def test_a_plan_of_format_1_is_read() -> None:
    plan = QuantPlan.load(GOLDEN / "plan.safetensors")
    assert plan.fingerprint == tiny_plan().fingerprint
    assert plan.spared == {"stem.input": "asked for"}


def test_ranges_of_format_1_are_read() -> None:
    ranges = Ranges.load(GOLDEN / "ranges.safetensors")
    seen = ranges.sites["head.input"]
    assert (float(seen.low), float(seen.high), seen.role, seen.shape) == (-1.0, 2.0, "input", (16,))


def test_images_of_format_1_are_read() -> None:
    images = ImageSet.load(GOLDEN / "images.safetensors")
    assert (len(images), images.source, images.preprocess) == (2, "synthetic:noise", PREPROCESS)
    assert images.labels is not None
    assert images.labels.tolist() == [0, 2]


def test_a_baseline_of_format_1_is_read() -> None:
    baseline = Baseline.load(GOLDEN / "baseline.json")
    assert (baseline.format, baseline.model, baseline.mode, baseline.top1) == (1, "tiny", "labels", 50.0)
    assert baseline.of(["0123456789abcdef", "fedcba9876543210", "0" * 16]).tolist() == [2, 0, -1]


def _rewritten(path: Path, old: str, new: str, to: Path) -> Path:
    """The safetensors file with another text of the same length in its header."""
    assert len(old) == len(new)
    content = path.read_bytes()
    assert content.count(old.encode()) == 1
    to.write_bytes(content.replace(old.encode(), new.encode()))
    return to


_FORMAT = r"\"format\":1", r"\"format\":2"
_SPACED = r"\"format\": 1", r"\"format\": 2"


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (*_FORMAT, "format 2"),
        (r"\"spared\"", r"\"skewed\"", "`skewed`"),
        (r"\"axis\":0", r"\"skew\":0", "`skew`"),
    ],
)
def test_a_plan_from_the_future_is_told_with_the_remedy(tmp_path: Path, old: str, new: str, named: str) -> None:
    path = _rewritten(GOLDEN / "plan.safetensors", old, new, tmp_path / "plan.safetensors")
    with pytest.raises(PlanError, match="seems to be of a later version") as caught:
        QuantPlan.load(path)
    assert named in caught.value.why
    assert "upgrade dfq-deploy" in caught.value.fix


def test_ranges_from_the_future_are_told_with_the_remedy(tmp_path: Path) -> None:
    path = _rewritten(GOLDEN / "ranges.safetensors", *_FORMAT, tmp_path / "ranges.safetensors")
    with pytest.raises(PlanError, match="seems to be of a later version"):
        Ranges.load(path)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (*_SPACED, "format 2"),
        (r"\"made_by\"", r"\"made_in\"", "`made_in`"),
        (r"\"crop_pct\"", r"\"crop_pts\"", "`crop_pts`"),
    ],
)
def test_images_from_the_future_are_told_with_the_remedy(tmp_path: Path, old: str, new: str, named: str) -> None:
    path = _rewritten(GOLDEN / "images.safetensors", old, new, tmp_path / "images.safetensors")
    with pytest.raises(ImagesError, match="seems to be of a later version") as caught:
        ImageSet.load(path)
    assert named in caught.value.why


def test_a_stale_report_and_signature_go_with_the_manifest(bundle: Path) -> None:
    for name in ("report.json", "manifest.sig"):
        (bundle / name).write_bytes(b"{}")
    assert unseal_bundle(bundle) == set(_FILES)
    assert sorted(file.name for file in bundle.iterdir()) == sorted(_FILES)
    shutil.rmtree(bundle)
    assert unseal_bundle(bundle) == set()
    with pytest.raises(BundleError, match="is not a bundle"):
        open_bundle(bundle)
