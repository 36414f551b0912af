"""How TensorRT 10, 11 and RTX are called, against the names that their bindings really have, and what failures leave.

Nothing here infers: the surfaces answer what a test tells them, and bytes stand for the engine.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from surfaces import made, surface
from tiny_quantized import plan_for, quantized, written

from calibrators.errors import BackendError
from exporters.backends import BuildOptions
from exporters.tensorrt.builder import build_engine

_TABLE = (
    "Layers:\n"
    "Name: fc_myl0_1, LayerType: gemm, Inputs: [ { Name: a, Dimensions: [-1,64], Datatype: Int8, Format: x }], "
    "Constants: [ { Name: b, Dimensions: [64,96], Datatype: Int8, Format: x }], "
    "Outputs: [ { Name: c, Datatype: Float }], TacticName: stub, StreamId: 0, "
    "Metadata: [ONNX Layer: fc][ONNX Layer: fc.input.dequantize]\n"
    "I/O Tensors:\nimages"
)
_INSPECTED = json.dumps({"Layers": [{"Name": "fc", "LayerType": "gemm", "Inputs": [{"Format/Datatype": "Int8"}]}]})
_ENGINE = b"engine"


def _answering(name: str, *, table: str = _TABLE, built: bytes | None = _ENGINE, cached: bool = True) -> Any:
    """The surface `name` that parses everything, logs `table`, and gives `built` for an engine."""
    trt = surface(name)

    def builds(builder: Any, network: Any, config: Any) -> bytes | None:
        (log,) = _called(trt, "Builder")
        log.log(trt.ILogger.VERBOSE, table)
        if built is None:
            log.log(trt.ILogger.ERROR, "no kernel for fc.")
        return built

    trt.Builder.create_network = lambda builder, flags: made(trt.INetworkDefinition)
    trt.Builder.create_builder_config = lambda builder: trt.config
    trt.Builder.create_optimization_profile = lambda builder: made(trt.IOptimizationProfile)
    trt.Builder.build_serialized_network = builds
    trt.OnnxParser.parse_from_file = lambda parser, path: True
    trt.INetworkDefinition.get_input = lambda network, index: made(trt.ITensor, name="images", shape=(-1, 16, 64))
    trt.IOptimizationProfile.set_shape = lambda profile, name, smallest, usual, largest: None
    trt.config = made(trt.IBuilderConfig)
    trt.IBuilderConfig.clear_flag = lambda config, flag: None
    trt.IBuilderConfig.add_optimization_profile = lambda config, profile: 0
    trt.IBuilderConfig.set_memory_pool_limit = lambda config, pool, size: None
    trt.IBuilderConfig.create_timing_cache = lambda config, data: made(trt.ITimingCache)
    trt.IBuilderConfig.set_timing_cache = lambda config, cache, ignore_mismatch: cached
    trt.ITimingCache.serialize = lambda cache: b"timings"
    return trt


def _called(trt: Any, name: str) -> tuple[Any, ...]:
    (arguments,) = [arguments for called, arguments in trt.calls if called == name]
    return tuple(arguments)


@pytest.fixture(params=["tensorrt-10.16", "tensorrt-11.4"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    ir.save(quantized("fc", plan_for("fc")), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    (tmp_path / "built").mkdir()
    return tmp_path / "built" / "model.engine"


def test_the_network_is_strongly_typed_and_the_engine_can_be_inspected(name: str, model: Path, engine: Path) -> None:
    trt = _answering(name)
    (kernel,) = build_engine(trt, model, engine, BuildOptions(batch=(1, 8, 32)))
    assert (kernel.inputs, kernel.constants) == (("int8",), ("int8",))
    assert kernel.nodes == {"fc", "fc.input.dequantize"}
    assert engine.read_bytes() == _ENGINE
    (flags,) = _called(trt, "Builder.create_network")
    assert flags == {"tensorrt-10.16": 2, "tensorrt-11.4": 1}[name]
    assert _called(trt, "OnnxParser.parse_from_file") == (str(model),)
    assert trt.config.profiling_verbosity is trt.ProfilingVerbosity.DETAILED
    assert _called(trt, "IBuilderConfig.clear_flag") == (trt.BuilderFlag.TF32,), "fp32 is fp32"
    assert _called(trt, "IOptimizationProfile.set_shape") == ("images", (1, 16, 64), (8, 16, 64), (32, 16, 64))
    assert len(_called(trt, "IBuilderConfig.add_optimization_profile")) == 1


def test_what_is_not_asked_for_is_left_to_tensorrt(name: str, model: Path, engine: Path) -> None:
    trt = _answering(name)
    build_engine(trt, model, engine, BuildOptions(batch=(1, 8, 32)))
    called = {name for name, _ in trt.calls}
    assert not called & {"IBuilderConfig.set_memory_pool_limit", "IBuilderConfig.create_timing_cache"}
    with pytest.raises(NotImplementedError, match="no value"):
        _ = trt.config.builder_optimization_level
    assert [file.name for file in engine.parent.iterdir()] == ["model.engine"]


def test_level_and_workspace_are_passed_on(name: str, model: Path, engine: Path) -> None:
    trt = _answering(name)
    build_engine(trt, model, engine, BuildOptions(batch=(1, 8, 32), level=0, workspace=1 << 30))
    assert trt.config.builder_optimization_level == 0
    assert _called(trt, "IBuilderConfig.set_memory_pool_limit") == (trt.MemoryPoolType.WORKSPACE, 1 << 30)


def test_targets_go_to_the_binding_that_has_them(model: Path, engine: Path) -> None:
    trt = _answering("tensorrt_rtx-1.7")
    set_targets: list[tuple[Any, int]] = []
    trt.IBuilderConfig.set_compute_capability = lambda config, target, index: set_targets.append((target, index))
    build_engine(trt, model, engine, BuildOptions(batch=(1, 2, 4), targets=("sm89", "sm120")))
    assert trt.config.num_compute_capabilities == 2
    assert set_targets == [(trt.ComputeCapability.SM89, 0), (trt.ComputeCapability.SM120, 1)]


def test_a_timing_cache_is_read_used_and_written_again(name: str, model: Path, engine: Path) -> None:
    timings = engine.with_name("timing.cache")
    for before in (b"", b"timings"):
        trt = _answering(name)
        build_engine(trt, model, engine, BuildOptions(batch=(1, 2, 4)), timing_cache=timings)
        assert _called(trt, "IBuilderConfig.create_timing_cache") == (before,)
        cache, ignore_mismatch = _called(trt, "IBuilderConfig.set_timing_cache")
        assert type(cache) is trt.ITimingCache
        assert ignore_mismatch is False
        assert [called for called, _ in trt.calls].index("IBuilderConfig.set_timing_cache") < [
            called for called, _ in trt.calls
        ].index("Builder.build_serialized_network"), "a cache that is set afterwards serves nobody"
        assert timings.read_bytes() == b"timings"


def test_a_timing_cache_of_another_version_is_refused_before_the_build(name: str, model: Path, engine: Path) -> None:
    timings = engine.with_name("timing.cache")
    timings.write_bytes(b"of another version")
    trt = _answering(name, cached=False)
    with pytest.raises(BackendError) as caught:
        build_engine(trt, model, engine, BuildOptions(batch=(1, 2, 4)), timing_cache=timings)
    assert str(caught.value) == (
        f"`{timings}` is no timing cache for this TensorRT and this GPU.\n"
        "  why: it was written by another version, for another GPU, or is damaged.\n"
        "  fix: delete it: the build makes a new one."
    )
    assert "Builder.build_serialized_network" not in {called for called, _ in trt.calls}
    assert (timings.read_bytes(), engine.exists()) == (b"of another version", False)


@pytest.mark.parametrize(("node", "said"), [("boxes", "`boxes` (NonMaxSuppression)"), ("", "a node")])
@pytest.mark.parametrize(
    ("text", "why"), [("no importer\nfor it", "no importer for it"), ("false", "UNSUPPORTED_NODE")]
)
def test_an_operator_that_the_parser_does_not_know_is_named(
    name: str, model: Path, engine: Path, node: str, said: str, text: str, why: str
) -> None:
    def refuses(parser: Any, path: str) -> bool:
        parser._values["num_errors"] = 1
        return False

    trt = _answering(name)
    trt.OnnxParser.parse_from_file = refuses
    trt.OnnxParser.get_error = lambda parser, index: made(trt.ParserError)
    trt.ParserError.node_name = lambda error: node
    trt.ParserError.node_operator = lambda error: "NonMaxSuppression"
    trt.ParserError.desc = lambda error: text
    trt.ParserError.code = lambda error: trt.ErrorCode.UNSUPPORTED_NODE
    with pytest.raises(BackendError) as caught:
        build_engine(trt, model, engine, BuildOptions(batch=(1, 2, 4)))
    assert str(caught.value) == (
        f"TensorRT's parser does not take {said}.\n"
        f"  why: {why}\n"
        "  fix: pick another variant of the model, or use --backend ort."
    )
    assert not engine.exists()


def test_rtx_names_an_operator_that_it_does_not_know(engine: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    text = "agraph (float[N, 8, 8] images) => (float[N] logits) { [area] logits = Det (images) }"
    ir.save(written(text), engine.with_name("model.onnx"))
    with pytest.raises(BackendError, match=r"does not take `area` \(Det\)") as caught:
        build_engine(trt, engine.with_name("model.onnx"), engine, BuildOptions(batch=(1, 2, 4), targets=("sm89",)))
    assert caught.value.why == "UNSUPPORTED_NODE"
    assert not engine.exists()


def test_rtx_tells_its_layers_though_another_logger_came_first(model: Path, engine: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    others = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
    kernels = build_engine(trt, model, engine, BuildOptions(batch=(1, 2, 4), targets=("sm89",)))
    assert any("fc" in kernel.nodes for kernel in kernels)
    assert others.logger is not None, "it lived until here"


def test_a_build_that_gives_nothing_says_what_the_log_said(name: str, model: Path, engine: Path) -> None:
    with pytest.raises(BackendError) as caught:
        build_engine(_answering(name, built=None), model, engine, BuildOptions(batch=(1, 2, 4)))
    assert (caught.value.what, caught.value.why) == (
        f"{surface(name).__name__} {surface(name).__version__} cannot build this model.",
        "no kernel for fc.",
    )
    assert list(engine.parent.iterdir()) == []


def _inspecting(trt: Any, information: str) -> None:
    trt.Runtime.deserialize_cuda_engine = lambda runtime, data: made(trt.ICudaEngine)
    trt.ICudaEngine.create_engine_inspector = lambda engine: made(trt.EngineInspector)
    trt.EngineInspector.get_engine_information = lambda inspector, form: information


@pytest.mark.parametrize("table", ["", "Fused Layers: fc"])
def test_where_the_log_holds_no_layers_the_inspector_is_asked(name: str, model: Path, engine: Path, table: str) -> None:
    trt = _answering(name, table=table)
    _inspecting(trt, _INSPECTED)
    (kernel,) = build_engine(trt, model, engine, BuildOptions(batch=(1, 2, 4)))
    assert (kernel.name, kernel.inputs, kernel.constants) == ("fc", ("int8",), None)
    assert _called(trt, "Runtime.deserialize_cuda_engine") == (_ENGINE,)
    assert _called(trt, "EngineInspector.get_engine_information") == (trt.LayerInformationFormat.JSON,)


def test_where_nobody_can_say_what_was_built_nothing_is_claimed(name: str, model: Path, engine: Path) -> None:
    trt = _answering(name, table="")
    trt.Runtime.deserialize_cuda_engine = lambda runtime, data: None
    with pytest.raises(BackendError, match="nobody can say what it computes in") as caught:
        build_engine(trt, model, engine, BuildOptions(batch=(1, 2, 4)))
    assert "dfq-deploy build" in caught.value.fix


_write = Path.write_bytes


def _fails(file: str, error: BaseException) -> Callable[[Path, bytes], int]:
    """Path.write_bytes that stops in the middle of `file`."""

    def write(path: Path, data: bytes) -> int:
        _write(path, data[: len(data) // 2] if path.name == file else data)
        if path.name == file:
            raise error
        return len(data)

    return write


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("file", ["model.engine", "timing.cache"])
@pytest.mark.parametrize("before", [None, b"of an earlier build"])
def test_a_full_disk_and_ctrl_c_leave_the_old_file_or_none(
    name: str, model: Path, engine: Path, monkeypatch: pytest.MonkeyPatch,
    before: bytes | None, file: str, error: BaseException,
) -> None:  # fmt: skip
    if before is not None:
        engine.with_name(file).write_bytes(before)
    monkeypatch.setattr(Path, "write_bytes", _fails(file, error))
    with pytest.raises(type(error)):
        build_engine(
            _answering(name),
            model,
            engine,
            BuildOptions(batch=(1, 2, 4)),
            timing_cache=engine.with_name("timing.cache"),
        )
    left = {path.name: path.read_bytes() for path in engine.parent.iterdir()}
    whole = {"model.engine": _ENGINE} if file == "timing.cache" else {}
    assert left == {**whole, **({} if before is None else {file: before})}


def test_ctrl_c_while_tensorrt_builds_leaves_nothing(name: str, model: Path, engine: Path) -> None:
    def interrupted(builder: Any, network: Any, config: Any) -> bytes:
        raise KeyboardInterrupt

    trt = _answering(name)
    trt.Builder.build_serialized_network = interrupted
    with pytest.raises(KeyboardInterrupt):
        build_engine(trt, model, engine, BuildOptions(batch=(1, 2, 4)), timing_cache=engine.with_name("timing.cache"))
    assert list(engine.parent.iterdir()) == []
