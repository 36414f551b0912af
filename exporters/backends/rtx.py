"""TensorRT for RTX: builds engines ahead of time, for named GPUs, on a machine that has none.

The engine holds kernels for each target, or none in particular: the GPU's driver finishes them when it is loaded. It
is built and its layers are read with no GPU; running it takes one. What is finished at the first load is kept in the
user's cache folder, not in the bundle: it is code, and the manifest vouches for all code in a bundle.
"""

from collections.abc import Mapping
from pathlib import Path

import platformdirs

try:
    import tensorrt_rtx as trt
except ImportError:  # the extra [rtx] brings it
    trt = None

from calibrators.errors import BackendError, NotHereError
from calibrators.files import sha256_of
from calibrators.plan import QuantPlan
from exporters.backends import BuildOptions, Built, Placement
from exporters.census import Census
from exporters.tensorrt.builder import build_planned
from exporters.tensorrt.engine import TensorRTEngine
from exporters.tensorrt.loading import refuse_other
from exporters.tensorrt.refusals import refuse_plan, refuse_threads
from exporters.tensorrt.verbs import prepare, time_layers, wanted

__all__ = ["build", "check", "load", "placement", "prepare", "time_layers"]

_ENGINE = "model.engine"
_BLOCKS = (16, 32, 64, 128)
_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


def placement(options: BuildOptions) -> Placement:
    """As TensorRT wants it."""
    return wanted(_BLOCKS)


def check(plan: QuantPlan, options: BuildOptions) -> None:
    """Return if the plan can be built for the targets.

    Raises:
        BackendError: It cannot, or a target does not exist.
    """
    unknown = [target for target in options.targets if target not in _TARGETS]
    if unknown:
        raise BackendError(
            what=f"TensorRT for RTX builds for no `{unknown[0]}`.",
            why=f"its targets are {', '.join(_TARGETS)}.",
            fix="pass some of them with --target, or none: the engine then fits every GPU that it knows.",
        )
    if "sm75" in options.targets and (options.body != "fp16" or plan.sites):
        raise BackendError(
            what="this cannot be built for sm75.",
            why="TensorRT for RTX has float16 matmuls there only, and a quantized layer puts out float32.",
            fix="use --float fp16 and --scheme float, or leave sm75 out of --target.",
        )
    refuse_plan(plan, targets=options.targets, blocks=_BLOCKS)


def build(model: Path, plan: QuantPlan, options: BuildOptions) -> Built:
    """Build `model.engine` beside the model; pending where TensorRT for RTX is not installed.

    Raises:
        BackendError: TensorRT for RTX does not take the model.
        ExportError: A layer that the plan quantizes is computed in float.
    """
    if trt is None:
        return Built("pending", Census({}, {}), note="TensorRT for RTX is not installed here.")
    census = build_planned(trt, model, model.with_name(_ENGINE), options, plan)
    made_for = {"tensorrt_rtx": trt.__version__, "targets": ",".join(options.targets)}
    return Built("built", census, (_ENGINE,), made_for)


def load(
    model: Path, made_for: Mapping[str, str], options: BuildOptions, *, threads: int | None = None
) -> TensorRTEngine:
    """The engine beside `model`.

    Raises:
        NotHereError: There is no GPU, or TensorRT for RTX is not installed.
        BackendError: The engine was made for another version or another GPU, or threads are named.
    """
    refuse_threads(threads)
    if trt is None:
        raise NotHereError(
            what="TensorRT for RTX is not installed here.",
            why="it runs this engine.",
            fix="pip install 'dfq-deploy[rtx]'.",
        )
    engine = model.with_name(_ENGINE)
    refuse_other(made_for, {"tensorrt_rtx": trt.__version__}, engine)
    kernels = platformdirs.user_cache_path("dfq-deploy") / f"kernels-{sha256_of(engine)[:16]}"
    return TensorRTEngine(trt, engine, options.batch, cache=kernels)
