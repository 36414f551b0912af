"""TensorRT 10 and 11: builds an engine for the GPU at hand, by timing kernels on it.

Where TensorRT or the GPU is missing the engine is pending: `dfq-deploy build` makes it on the machine that has both.
Until then TensorRT for RTX, if it is installed, says whether the model parses and builds and what its layers would be
computed in: its parser is the same, its kernels need not be.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

try:
    import tensorrt as trt
except ImportError:  # NVIDIA's own index has it; needed on the machine that builds
    trt = None
try:
    import tensorrt_rtx as rtx
except ImportError:  # the extra [rtx] brings it
    rtx = None

from calibrators.errors import BackendError, ExportError, NotHereError
from calibrators.plan import QuantPlan
from exporters.backends import BuildOptions, Built, Placement
from exporters.census import Census
from exporters.tensorrt import cuda
from exporters.tensorrt.builder import build_planned
from exporters.tensorrt.engine import TensorRTEngine
from exporters.tensorrt.loading import refuse_other
from exporters.tensorrt.refusals import DOCUMENTED_BLOCKS, refuse_model, refuse_plan, refuse_threads
from exporters.tensorrt.verbs import prepare, time_layers, wanted

__all__ = ["build", "check", "load", "placement", "prepare", "time_layers"]

_ENGINE = "model.engine"


def placement(options: BuildOptions) -> Placement:
    """As TensorRT wants it."""
    return wanted(DOCUMENTED_BLOCKS)


def check(plan: QuantPlan, options: BuildOptions) -> None:
    """Return if TensorRT can run the plan.

    Raises:
        BackendError: It cannot, or targets are named.
    """
    if options.targets:
        raise BackendError(
            what="TensorRT takes no --target.",
            why="it builds for the GPU of the machine that it runs on.",
            fix="leave it out, or use --backend rtx, which builds for GPUs that are not there.",
        )
    refuse_plan(plan, targets=(), blocks=DOCUMENTED_BLOCKS)


def build(model: Path, plan: QuantPlan, options: BuildOptions) -> Built:
    """Build `model.engine` beside the model; pending where TensorRT or a GPU is missing.

    Raises:
        BackendError: TensorRT does not take the model.
        ExportError: A layer that the plan quantizes is computed in float.
    """
    gpu = cuda.device()
    if trt is None or gpu is None:
        return _pending(model, plan, options)
    refuse_plan(plan, targets=[gpu.capability], blocks=DOCUMENTED_BLOCKS)
    timings = model.with_name(f"timing-{trt.__version__}-{gpu.capability}.cache")  # no other version or GPU takes it
    census = build_planned(trt, model, model.with_name(_ENGINE), options, plan, timing_cache=timings)
    made_for = {"tensorrt": trt.__version__, "gpu": f"{gpu.name} ({gpu.capability})"}
    return Built("built", census, (_ENGINE, timings.name), made_for)


def load(
    model: Path, made_for: Mapping[str, str], options: BuildOptions, *, threads: int | None = None
) -> TensorRTEngine:
    """The engine beside `model`.

    Raises:
        NotHereError: There is no GPU, or TensorRT is not installed.
        BackendError: The engine was made for another version or another GPU, or threads are named.
    """
    refuse_threads(threads)
    if trt is None:
        raise NotHereError(
            what="TensorRT is not installed here.", why="it runs this engine.", fix="pip install tensorrt."
        )
    gpu = cuda.require()
    here = {"tensorrt": trt.__version__, "gpu": f"{gpu.name} ({gpu.capability})"}
    refuse_other(made_for, here, model.with_name(_ENGINE))
    return TensorRTEngine(trt, model.with_name(_ENGINE), options.batch)


def _pending(model: Path, plan: QuantPlan, options: BuildOptions) -> Built:
    missing = "TensorRT is not installed here" if trt is None else "there is no NVIDIA GPU here"
    if rtx is None:
        return Built("pending", Census({}, {}), note=f"{missing}.")
    fp8 = any(q.codes.name == "float8_e4m3fn" for q in plan.sites.values())
    forecast = replace(options, targets=("sm89", "sm120") if fp8 else ())
    refuse_model(ir.load(model))
    try:
        with TemporaryDirectory() as folder:
            census = build_planned(rtx, model, Path(folder) / _ENGINE, forecast, plan)
    except ExportError as error:
        asked = f"TensorRT for RTX, asked in TensorRT's place, would not keep to the plan: {error.what}"
        raise ExportError(what=asked, why=error.why, fix=error.fix) from error
    except BackendError as error:  # of TensorRT for RTX, whose kernels are not TensorRT's
        note = f"{missing}; TensorRT for RTX {rtx.__version__}, asked in its place: {error.what} {error.why}"
        return Built("pending", Census({}, {}), note=note)
    note = f"{missing}; TensorRT for RTX {rtx.__version__} builds the model, with its layers as listed."
    return Built("pending", census, note=note)
