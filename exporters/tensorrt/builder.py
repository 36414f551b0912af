"""From an ONNX file to the bytes of a TensorRT engine, and to the table of its kernels.

The network is strongly typed: number formats are what the ONNX file says, and no builder flag changes them.
Polygraphy's loaders are not used: they hold one binding and one logger per process, and the layer table comes through
the logger.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir

from calibrators.errors import BackendError
from calibrators.files import written_whole
from calibrators.plan import QuantPlan
from exporters.backends import BuildOptions
from exporters.census import Census
from exporters.tensorrt.layers import Kernel, census_of, kernels_in_json, kernels_in_log
from exporters.tensorrt.log import Recorder, recorder
from exporters.tensorrt.refusals import refuse_model

__all__ = ["build_engine", "build_planned"]


def build_engine(
    trt: ModuleType,
    model: Path,
    engine: Path,
    options: BuildOptions,
    *,
    timing_cache: Path | None = None,
    judge: Callable[[list[Kernel]], Any] = list,
) -> Any:
    """Build `engine` from the ONNX file `model`; returns what `judge` makes of its kernels: a list of them.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        model: A quantized model with input `images`, N free.
        engine: File to write, whole or not at all.
        options: What it is built for.
        timing_cache: File that keeps the timings of kernels from build to build; None for none.
        judge: Shown the kernels before anything is written; what it raises leaves the old files as they are.

    Raises:
        BackendError: TensorRT does not take the model or the settings, or cannot say what it built.
    """
    refuse_model(ir.load(model), targets=options.targets)
    log = recorder(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        raise _parse_failed(parser)
    config = _config(trt, builder, network, options)
    cache = _timing_cache(config, timing_cache, log)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise BackendError(
            what=f"{trt.__name__} {trt.__version__} cannot build this model.",
            why=" ".join(log.errors()) or "it gives no reason.",
            fix="spare the layer that it names with --spare, or report this model.",
        )
    judged = judge(_kernels(trt, log, serialized))
    with written_whole(engine) as temporary:
        temporary.write_bytes(serialized)
    if timing_cache is not None:
        with written_whole(timing_cache) as temporary:
            temporary.write_bytes(cache.serialize())
    return judged


def build_planned(
    trt: ModuleType,
    model: Path,
    engine: Path,
    options: BuildOptions,
    plan: QuantPlan,
    *,
    timing_cache: Path | None = None,
) -> Census:
    """Build `engine` as `build_engine` does, and write it only if it computes what `plan` asks for.

    Raises:
        BackendError: See `build_engine`.
        ExportError: A layer that the plan quantizes is computed in float.
    """

    def judge(kernels: list[Kernel]) -> Census:
        return census_of(kernels, plan, options.body)

    census: Census = build_engine(trt, model, engine, options, timing_cache=timing_cache, judge=judge)
    return census


def _network_flags(trt: ModuleType) -> int:
    """Strongly typed, where that is not the only kind there is."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _config(trt: ModuleType, builder: Any, network: Any, options: BuildOptions) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, it multiplies fp32 with the 10-bit mantissas of fp16
    if options.level is not None:
        config.builder_optimization_level = options.level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    profile = builder.create_optimization_profile()
    images = network.get_input(0)
    profile.set_shape(images.name, *[(n, *tuple(images.shape)[1:]) for n in options.batch])
    config.add_optimization_profile(profile)
    if options.targets:
        config.num_compute_capabilities = len(options.targets)
        for index, target in enumerate(options.targets):
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
