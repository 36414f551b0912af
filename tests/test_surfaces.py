"""The recorded TensorRT surfaces: they have what the bindings have, refuse what those refuse, pretend to nothing."""

import importlib.util
import json
from typing import Any

import pytest
from surfaces import given, made, surface
from surfaces.record import recorded

NAMES = ("tensorrt-10.16", "tensorrt-11.4", "tensorrt_rtx-1.7")


@pytest.fixture
def trt() -> Any:
    return surface("tensorrt-10.16")


@pytest.mark.parametrize("name", NAMES)
def test_every_surface_has_what_a_builder_uses(name: str) -> None:
    trt = surface(name)
    assert int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) == (name == "tensorrt-10.16")
    assert trt.int8 is trt.DataType.INT8
    assert trt.Logger.VERBOSE is trt.ILogger.Severity.VERBOSE is trt.Logger.Severity.VERBOSE
    assert trt.ProfilingVerbosity.DETAILED.name == "DETAILED"
    assert hasattr(trt.OnnxParser, "supports_model_v2")


def test_calibrators_and_precision_flags_are_in_10_alone() -> None:
    modern = [surface(name) for name in NAMES[1:]]
    for name in ("IInt8EntropyCalibrator2", "IInt8MinMaxCalibrator", "CalibrationAlgoType"):
        assert hasattr(surface(NAMES[0]), name)
        assert not any(hasattr(trt, name) for trt in modern)
    assert not any(hasattr(trt.BuilderFlag, "INT8") or hasattr(trt.IBuilderConfig, "int8_calibrator") for trt in modern)


def test_what_the_binding_refuses_is_refused(trt: Any) -> None:
    with pytest.raises(TypeError, match="No constructor"):
        trt.IBuilderConfig()
    config = made(trt.IBuilderConfig, num_optimization_profiles=0)
    config.builder_optimization_level = 3
    assert (config.builder_optimization_level, config.num_optimization_profiles) == (3, 0)
    for name in ("num_optimization_profiles", "set_flag", "nonsense"):
        with pytest.raises(AttributeError):
            setattr(config, name, 1)
    with pytest.raises(AttributeError):
        config.nonsense()
    with pytest.raises(AttributeError):
        trt.Builder.nonsense = print
    with pytest.raises(AttributeError):
        made(trt.IBuilderConfig, nonsense=1)
    with pytest.raises(AttributeError):
        given(trt.OnnxParser, nonsense=1)


def test_nothing_is_pretended_and_every_call_is_kept(trt: Any) -> None:
    builder = trt.Builder("logger")
    with pytest.raises(NotImplementedError, match=r"Builder\.create_network"):
        builder.create_network(0)
    with pytest.raises(NotImplementedError, match="max_threads no value"):
        _ = builder.max_threads
    given(trt.Builder, max_threads=2, num_DLA_cores=0)
    assert (builder.max_threads, builder.num_DLA_cores) == (2, 0)
    trt.Builder.create_network = lambda self, flags: f"network {flags}"
    assert builder.create_network(flags=1) == "network 1"
    assert trt.calls == [("Builder", ("logger",)), ("Builder.create_network", (1,))]
    assert surface("tensorrt-10.16").calls == []


def test_a_subclass_has_attributes_of_its_own(trt: Any) -> None:
    class Calibrator(trt.IInt8MinMaxCalibrator):  # type: ignore[misc]
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size

        def get_batch_size(self) -> int:
            return self.size

    assert Calibrator(3).get_batch_size() == 3


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_the_surface_of_rtx_is_that_of_the_installed_binding() -> None:
    binding = importlib.import_module("tensorrt_rtx")
    if not binding.__version__.startswith("1.7."):
        pytest.skip(f"the record is of 1.7, installed is {binding.__version__}")
    there, here = json.loads(recorded(binding)), surface("tensorrt_rtx-1.7")
    assert there["classes"].keys() >= {"Builder", "ComputeCapability"}
    for name, facts in there["classes"].items():
        cls = here
        for part in name.split("."):
            cls = getattr(cls, part)
        assert cls.facts == facts
