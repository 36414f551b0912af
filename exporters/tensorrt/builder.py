"""From an ONNX file to the bytes of a TensorRT engine, and to the table of its kernels.

The network is strongly typed: number formats are what the ONNX file says, and no builder flag changes them.
Polygraphy's loaders are not used: they hold one binding and one logger per process, and the layer table comes through
the logger.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir

from calibrators.errors import BackendError
from calibrators.files import written_whole
from calibrators.plan import QuantPlan
from exporters.census import Body, Census
from exporters.tensorrt.layers import Kernel, census_of, kernels_in_json, kernels_in_log
from exporters.tensorrt.log import Recorder, recorder
from exporters.tensorrt.refusals import refuse_model

__all__ = ["BuildSettings", "build_engine", "build_planned"]


@dataclass(frozen=True)
class BuildSettings:
    """How an engine is built.

    Attributes:
        batch: Smallest, usual and largest number of images per call.
        targets: GPUs to build for, as `sm89`; empty for the one at hand, or for all that TensorRT for RTX knows.
        level: The builder's optimisation level, 0 to 5; None leaves TensorRT's own.
        workspace: Scratch memory that a kernel may use, in bytes; None leaves TensorRT's own.
        timing_cache: File that keeps the timings of kernels from build to build; None for none.
    """

    batch: tuple[int, int, int]
    targets: tuple[str, ...] = ()
    level: int | None = None
    workspace: int | None = None
    timing_cache: Path | None = None


def build_engine(
    trt: ModuleType,
    model: Path,
    engine: Path,
    settings: BuildSettings,
    check: Callable[[list[Kernel]], object] = lambda _: None,
) -> list[Kernel]:
    """Build `engine` from the ONNX file `model`; returns its kernels.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        model: A quantized model with input `images`, N free.
        engine: File to write, whole or not at all.
        settings: How.
        check: Shown the kernels before anything is written; what it raises leaves the old files as they are.

    Raises:
        BackendError: TensorRT does not take the model or the settings, or cannot say what it built.
    """
    refuse_model(ir.load(model), targets=settings.targets)
    log = recorder(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        raise _parse_failed(parser)
    config = _config(trt, builder, network, settings)
    cache = _timing_cache(config, settings.timing_cache, log)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise BackendError(
            what=f"{trt.__name__} {trt.__version__} cannot build this model.",
            why=" ".join(log.errors()) or "it gives no reason.",
            fix="spare the layer that it names with --spare, or report this model.",
        )
    kernels = _kernels(trt, log, serialized)
    check(kernels)
    with written_whole(engine) as temporary:
        temporary.write_bytes(serialized)
    if cache is not None and settings.timing_cache is not None:
        with written_whole(settings.timing_cache) as temporary:
            temporary.write_bytes(cache.serialize())
    return kernels


def build_planned(
    trt: ModuleType, model: Path, engine: Path, plan: QuantPlan, body: Body, settings: BuildSettings
) -> Census:
    """Build `engine` as `build_engine` does, and write it only if it computes what `plan` asks for.

    Raises:
        BackendError: See `build_engine`.
        ExportError: A layer that the plan quantizes is computed in float.
    """
    kernels = build_engine(trt, model, engine, settings, check=lambda kernels: census_of(kernels, plan, body))
    return census_of(kernels, plan, body)


def _network_flags(trt: ModuleType) -> int:
    """Strongly typed, where that is not the only kind there is."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _config(trt: ModuleType, builder: Any, network: Any, settings: BuildSettings) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, it multiplies fp32 with the 10-bit mantissas of fp16
    if settings.level is not None:
        config.builder_optimization_level = settings.level
    if settings.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    profile = builder.create_optimization_profile()
    images = network.get_input(0)
    profile.set_shape(images.name, *[(n, *tuple(images.shape)[1:]) for n in settings.batch])
    config.add_optimization_profile(profile)
    if settings.targets:
        config.num_compute_capabilities = len(settings.targets)
        for index, target in enumerate(settings.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    return config


def _timing_cache(config: Any, path: Path | None, log: Recorder) -> Any:
    """The timing cache that the build will use, filled from `path` if that is there; None if none is wanted."""
    if path is None:
        return None
    log.clear()
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    taken = cache is not None and config.set_timing_cache(cache, False)
    # It takes a damaged one for an empty one, with no more than a warning.
    warned = any(severity != "INFO" and "timing cache" in text for severity, text in log.messages)
    if not taken or (path.exists() and warned):
        raise BackendError(
            what=f"`{path}` is no timing cache for this TensorRT and this GPU.",
            why="it was written by another version, for another GPU, or is damaged.",
            fix="delete it: the build makes a new one.",
        )
    return cache


def _kernels(trt: ModuleType, log: Recorder, serialized: Any) -> list[Kernel]:
    """The engine's kernels: from the builder's log, else, where a GPU can load the engine, from the inspector."""
    table = next((text for _, text in log.messages if text.startswith("Layers:")), None)
    if table is not None:
        return kernels_in_log(table)
    engine = trt.Runtime(log).deserialize_cuda_engine(serialized)
    if engine is None:
        raise BackendError(
            what="the engine was built, but nobody can say what it computes in.",
            why="the builder did not log its layers, and the engine cannot be loaded here to be asked.",
            fix="build it on the machine that will run it, with `dfq-deploy build`.",
        )
    inspector = engine.create_engine_inspector()
    return kernels_in_json(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _parse_failed(parser: Any) -> BackendError:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    where = next(
        (f"`{error.node_name()}` ({error.node_operator()})" for error in errors if error.node_name()), "a node"
    )
    return BackendError(
        what=f"TensorRT's parser does not take {where}.",
        why=" ".join(map(_reason, errors)) or "it gives no reason.",
        fix="pick another variant of the model, or use --backend ort.",
    )


def _reason(error: Any) -> str:
    """What the parser says of a node; of an operator that it does not know at all its text is `false`."""
    return str(error.code().name if error.desc() in ("", "false") else error.desc())
