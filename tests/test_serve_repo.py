"""A model repository is what Triton's schema wants, and computes what `dfq_deploy.load` computes."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tritonclient
from google.protobuf import text_format
from PIL import Image

import dfq_deploy as dfq
from calibrators.errors import BackendError, BundleError, DeployError, RecipeError
from calibrators.preprocess import Preprocess
from dfq_deploy.cli import run
from dfq_deploy.serving import triton
from exporters.bundle import MANIFEST


def _module(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def schema() -> ModuleType:
    """Triton's own; loaded by its path, since the package around it wants gRPC."""
    return _module(Path(tritonclient.__file__).parent / "grpc" / "model_config_pb2.py", "model_config_pb2")


@pytest.fixture(scope="module")
def repository(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dfq.serve_repo(demo_bundle, tmp_path_factory.mktemp("triton") / "repository").folder


def _configs(repository: Path, schema: ModuleType) -> dict[str, Any]:
    found = {}
    for folder in sorted(repository.iterdir()):
        text = (folder / "config.pbtxt").read_text(encoding="utf-8")
        found[folder.name] = text_format.Parse(text, schema.ModelConfig())
    return found


def _rewritten(bundle: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of `bundle` whose manifest is another one."""
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("work"))
    facts = json.loads((folder / MANIFEST).read_text())
    change(facts)
    (folder / MANIFEST).write_text(json.dumps(facts))
    return folder


def _for_tensorrt(bundle: Path, folder: Path, **options: Any) -> Path:
    """A copy of `bundle` that says it holds a TensorRT engine."""
    engine = b"an engine"

    def change(facts: dict[str, Any]) -> None:
        facts["backend"] = "trt"
        facts["engine"] |= {"made_for": {"tensorrt": "10.9", "gpu": "L4 (sm89)"}, "files": ["model.engine"]}
        facts["engine"]["options"] |= {"provider": "", **options}
        facts["files"]["model.engine"] = sha256(engine).hexdigest()

    _rewritten(bundle, folder, change)
    (folder / "model.engine").write_bytes(engine)
    return folder


def test_the_configurations_are_what_the_schema_wants(repository: Path, schema: ModuleType) -> None:
    configs = _configs(repository, schema)
    assert list(configs) == ["demo", "demo_encoded", "demo_preprocess"]
    assert all(name == config.name and config.max_batch_size == 32 for name, config in configs.items())
    engine, both, before = configs.values()
    (images,), (logits,) = engine.input, engine.output
    assert (images.name, images.data_type, list(images.dims)) == ("images", schema.TYPE_FP32, [3, 32, 32])
    assert (logits.name, logits.data_type, list(logits.dims)) == ("logits", schema.TYPE_FP32, [10])
    assert (engine.platform, before.backend, both.platform) == ("onnxruntime_onnx", "python", "ensemble")
    (group,) = engine.instance_group
    assert (group.count, group.kind) == (1, schema.ModelInstanceGroup.KIND_CPU)
    assert engine.dynamic_batching.max_queue_delay_microseconds == 2000
    assert engine.dynamic_batching.default_queue_policy.max_queue_size == 64
    assert [warm.batch_size for warm in engine.model_warmup] == [1, 32]
    assert all(warm.inputs["images"].zero_data for warm in engine.model_warmup)


def test_the_ensemble_joins_what_the_other_two_take_and_give(repository: Path, schema: ModuleType) -> None:
    configs = _configs(repository, schema)
    both = configs["demo_encoded"]
    known = {tensor.name: tensor for tensor in both.input}
    for step in both.ensemble_scheduling.step:
        model = configs[step.model_name]
        for tensor in model.input:
            at = known[step.input_map[tensor.name]]
            assert (at.data_type, list(at.dims)) == (tensor.data_type, list(tensor.dims))
        known |= {step.output_map[tensor.name]: tensor for tensor in model.output}
    for tensor in both.output:
        assert (known[tensor.name].data_type, known[tensor.name].dims) == (tensor.data_type, tensor.dims)


def test_the_labels_lie_where_the_configuration_says(repository: Path, demo_bundle: Path, schema: ModuleType) -> None:
    for name in ("demo", "demo_encoded"):
        (logits,) = _configs(repository, schema)[name].output
        lines = (repository / name / logits.label_filename).read_text().splitlines()
        assert lines == (demo_bundle / "classes.txt").read_text().splitlines()


def _in_triton(model: Path, images: np.ndarray) -> np.ndarray:
    """What a session of Triton's ONNX Runtime backend computes: it sets no entry of a session's configuration."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"images": images})[0]
    return found


def test_the_model_computes_in_triton_what_the_bundle_does(repository: Path, demo_bundle: Path) -> None:
    images = np.random.default_rng(0).normal(size=(8, 3, 32, 32)).astype(np.float32)
    with dfq.load(demo_bundle) as runner:
        np.testing.assert_array_equal(_in_triton(repository / "demo" / "1" / "model.onnx", images), runner(images))


def test_packed_weights_are_floats_there_so_that_activations_are_not_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dfq.Recipe(model="demo", generator="noise", count=2, refine="none", scheme="w4a16", spare="massive")
    dfq.export(recipe, tmp_path / "bundle", limit=1)
    written = dfq.serve_repo(tmp_path / "bundle", tmp_path / "repository")
    assert "17 weights are floats" in written.notes[0]
    images = np.random.default_rng(0).normal(size=(8, 3, 32, 32)).astype(np.float32)
    with dfq.load(tmp_path / "bundle") as runner:
        wanted = runner(images)
    np.testing.assert_array_equal(_in_triton(written.folder / "demo" / "1" / "model.onnx", images), wanted)
    monkeypatch.setattr(triton, "_EXTERNAL_FROM_BYTES", 0)
    place = dfq.serve_repo(tmp_path / "bundle", tmp_path / "large").folder / "demo" / "1"
    assert {file.name for file in place.iterdir()} == {"model.onnx", "model.onnx.data"}
    np.testing.assert_array_equal(_in_triton(place / "model.onnx", images), wanted)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What Triton gives a Python model to import, as far as ours uses it."""

    class Tensor:
        def __init__(self, name: str, array: np.ndarray) -> None:
            self.name, self._array = name, array

        def as_numpy(self) -> np.ndarray:
            return self._array

    class Response:
        def __init__(self, output_tensors: list[Tensor], error: str | None = None) -> None:
            self.output_tensors, self.error = output_tensors, error

    module: Any = ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceResponse, module.TritonError = Tensor, Response, str
    module.get_input_tensor_by_name = lambda request, name: next(one for one in request if one.name == name)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    return module  # type: ignore[no-any-return]


def _python_model(repository: Path, schema: ModuleType, **changed: Any) -> Any:
    """The preprocessing model, initialized as Triton does, its numbers `changed`."""
    config = _configs(repository, schema)["demo_preprocess"]
    facts = json.loads(config.parameters["preprocess"].string_value) | changed
    args = {"model_config": json.dumps({"parameters": {"preprocess": {"string_value": json.dumps(facts)}}})}
    model = _module(repository / "demo_preprocess" / "1" / "model.py", "model").TritonPythonModel()
    model.initialize(args)
    return model


def _files(*images: Image.Image, kind: str = "png") -> np.ndarray:
    found = []
    for image in images:
        buffer = BytesIO()
        image.save(buffer, kind)
        found.append([buffer.getvalue()])
    return np.array(found, object)


def _pictures(seed: int = 0) -> list[Image.Image]:
    """Images of sizes and modes that differ."""
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 255, (40, 57, 4), np.uint8), "RGBA")
    resized = [noise.resize(size) for size in ((57, 40), (31, 90), (1, 1), (2, 9), (200, 33), (32, 32))]
    return [image.convert(mode) for image in resized for mode in ("RGB", "L", "RGBA", "LA", "1")] + [
        image.convert("RGB").convert("P") for image in resized
    ]


def test_python_preprocesses_as_the_bundle_does(
    repository: Path, demo_bundle: Path, schema: ModuleType, backend: Any
) -> None:
    pictures = _pictures()
    with dfq.load(demo_bundle) as runner:
        wanted = runner.preprocess(pictures)
    requests = [[backend.Tensor("encoded", _files(*pictures[:4]))], [backend.Tensor("encoded", _files(*pictures[4:]))]]
    answers = _python_model(repository, schema).execute(requests)
    found = [answer.output_tensors[0].as_numpy() for answer in answers]
    assert [len(images) for images in found] == [4, len(pictures) - 4]
    np.testing.assert_array_equal(np.concatenate(found), wanted)


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess((24, 24), 0.9, "center", "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        Preprocess((24, 40), 0.95, "squash", "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        Preprocess((28, 28), 0.875, "center", "bicubic", (0.1307,), (0.3081,)),
        Preprocess((24, 40), 0.9, "center", "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        Preprocess((24, 32), 1.0, "border", "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
    ids=["cropped", "squashed", "grey", "wide", "bordered"],
)
def test_python_preprocesses_whatever_the_numbers(
    repository: Path, schema: ModuleType, backend: Any, preprocess: Preprocess
) -> None:
    pictures = _pictures(1)
    model = _python_model(repository, schema, **asdict(preprocess))
    (answer,) = model.execute([[backend.Tensor("encoded", _files(*pictures))]])
    wanted = np.stack([preprocess(image) for image in pictures])
    np.testing.assert_array_equal(answer.output_tensors[0].as_numpy(), wanted)


def test_python_refuses_a_broken_file_in_its_own_request_alone(
    repository: Path, schema: ModuleType, backend: Any
) -> None:
    good = _files(Image.new("RGB", (40, 40)), kind="jpeg")
    broken = np.array([good[0], [good[0, 0][:-200]], [b""]], object)
    large = _files(Image.new("L", (101, 100)))
    narrow = _files(Image.new("L", (1, 10)))
    gif = _files(Image.new("L", (9, 9)), kind="gif")
    model = _python_model(repository, schema, max_pixels=10_000)
    answers = model.execute([[backend.Tensor("encoded", files)] for files in (good, broken, large, gif, good, narrow)])
    assert [answer.error is None for answer in answers] == [True, False, False, False, True, False]
    assert "image 1 cannot be decoded" in answers[1].error
    assert "image 0 has 101 x 100 pixels, more than 10000" in answers[2].error
    assert "image 0 has 1 x 10 pixels, more than 10000" in answers[5].error
    assert "send JPEG or PNG" in answers[3].error


def test_options_go_into_the_configuration(demo_bundle: Path, tmp_path: Path, schema: ModuleType) -> None:
    flags = ["--name", "m.1", "--instances", "3", "--delay-ms", "0.5", "--queue", "7", "--max-pixels", "99"]
    assert run(["serve-repo", str(demo_bundle), "--out", str(tmp_path / "r"), *flags]) == 0
    configs = _configs(tmp_path / "r", schema)
    engine, _, before = configs.values()
    assert list(configs) == ["m.1", "m.1_encoded", "m.1_preprocess"]
    assert {group.count for config in (engine, before) for group in config.instance_group} == {3}
    assert engine.dynamic_batching.max_queue_delay_microseconds == 500
    assert engine.dynamic_batching.default_queue_policy.max_queue_size == 7
    assert json.loads(before.parameters["preprocess"].string_value)["max_pixels"] == 99


def test_answers_that_would_depend_on_who_else_asks_are_not_gathered(
    demo_bundle: Path, tmp_path: Path, schema: ModuleType
) -> None:
    bundle = _rewritten(demo_bundle, tmp_path / "bundle", lambda facts: facts.update(scheme="w8a8_dynamic"))
    dfq.serve_repo(bundle, tmp_path / "r")
    assert not _configs(tmp_path / "r", schema)["demo"].HasField("dynamic_batching")
    with pytest.raises(RecipeError, match="--gather does not suit `w8a8_dynamic`"):
        dfq.serve_repo(bundle, tmp_path / "again", dfq.RepoOptions(gather=True))
    dfq.serve_repo(demo_bundle, tmp_path / "off", dfq.RepoOptions(gather=False))
    assert not _configs(tmp_path / "off", schema)["demo"].HasField("dynamic_batching")


def test_an_engine_of_tensorrt_goes_to_its_backend(demo_bundle: Path, tmp_path: Path, schema: ModuleType) -> None:
    bundle = _for_tensorrt(demo_bundle, tmp_path / "bundle")
    written = dfq.serve_repo(bundle, tmp_path / "r")
    engine = _configs(written.folder, schema)["demo"]
    assert engine.platform == "tensorrt_plan"
    assert engine.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU
    assert [file.name for file in (written.folder / "demo" / "1").iterdir()] == ["model.plan"]
    assert (written.folder / "demo" / "1" / "model.plan").read_bytes() == b"an engine"
    assert written.notes[0] == "the engine is for TensorRT 10.9 and L4 (sm89): Triton must have both."


def test_an_engine_of_onnx_runtime_on_a_gpu_is_put_there(demo_bundle: Path, tmp_path: Path, schema: ModuleType) -> None:
    def on_cuda(facts: dict[str, Any]) -> None:
        facts["engine"]["options"]["provider"] = "cuda"

    dfq.serve_repo(_rewritten(demo_bundle, tmp_path / "bundle", on_cuda), tmp_path / "r")
    assert _configs(tmp_path / "r", schema)["demo"].instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU


def _eight_channels(facts: dict[str, Any]) -> None:
    facts["preprocess"] |= {"mean": [0.5] * 8, "std": [0.5] * 8}


def _pending(facts: dict[str, Any]) -> None:
    facts["engine"] |= {"state": "pending", "note": "there is no GPU here."}


def _ort_tensorrt(facts: dict[str, Any]) -> None:
    facts["engine"]["options"]["provider"] = "tensorrt"


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (_pending, BundleError, "is not built yet"),
        (_eight_channels, BackendError, "cannot be served with its preprocessing"),
        (_ort_tensorrt, BackendError, "does not serve engines for `tensorrt`"),
        (lambda facts: facts.update(backend="rtx"), BackendError, "does not serve engines for `rtx`"),
    ],
    ids=["pending", "eight channels", "provider", "rtx"],
)
def test_what_triton_cannot_load_is_refused(
    demo_bundle: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], error: type[DeployError], match: str
) -> None:
    bundle = _rewritten(demo_bundle, tmp_path / "bundle", change)
    with pytest.raises(error, match=match):
        dfq.serve_repo(bundle, tmp_path / "r")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_engine_that_takes_no_single_image_is_refused(demo_bundle: Path, tmp_path: Path) -> None:
    bundle = _for_tensorrt(demo_bundle, tmp_path / "bundle", batch=[4, 8, 32])
    with pytest.raises(BackendError, match="takes 4 images or more"):
        dfq.serve_repo(bundle, tmp_path / "r")


def test_the_folder_is_written_whole_or_not_at_all(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(triton.configs, "ensemble", full)
    with pytest.raises(OSError, match="No space"):
        dfq.serve_repo(demo_bundle, tmp_path / "r")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "r").mkdir()
    with pytest.raises(BundleError, match="something lies at"):
        dfq.serve_repo(demo_bundle, tmp_path / "r")
    assert list((tmp_path / "r").iterdir()) == []
