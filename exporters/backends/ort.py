"""ONNX Runtime: runs the ONNX file itself, on the CPU or through the CUDA, TensorRT and TensorRT for RTX providers.

On the CPU, `build` lets ONNX Runtime optimise the graph and reads the result: a layer is quantized when its node has
become a quantized operator there. Where weights alone are quantized, `load` lets it unpack them once instead. CUDA runs
Q/DQ as a float simulation, so it is offered for weight-only and float models. The TensorRT providers compile the graph
with TensorRT and keep their engines in the user's cache folder; ONNX Runtime does not say what those compute in.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime

from calibrators.errors import BackendError, NotHereError
from calibrators.plan import QuantPlan
from exporters.backends import BuildOptions, Built, Placement
from exporters.census import Census, is_weight_only, precision_of
from exporters.ort_engine import PROVIDERS, TENSORRT, OrtEngine, cannot_load, session_options
from exporters.scales import shorten_scales
from exporters.tensorrt.fence import put_fences
from exporters.tensorrt.refusals import DOCUMENTED_BLOCKS, cannot_time_layers, refuse_plan, refuse_threads
from exporters.timing import SERIAL_SUFFIX, profile_layers

__all__ = ["build", "check", "load", "placement", "prepare", "time_layers"]

_INTEGER_KERNELS = {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearConv", "QLinearMatMul"}
_WEIGHT_ONLY_KERNEL = "MatMulNBits"  # computes in float: where inputs are quantized it is a fall-back
_BLOCKS = (32, 64, 128)


def placement(options: BuildOptions) -> Placement:
    """The CPU provider fuses an INT8 convolution only with its output; its first layer costs little time there."""
    tensorrt = options.provider in TENSORRT
    return Placement(
        first_layer=tensorrt,
        convolution_outputs=not tensorrt,
        noisy_layers=tensorrt,
        blocks=_blocks(options),
        zero_points=not tensorrt,
    )


def check(plan: QuantPlan, options: BuildOptions) -> None:
    """Return if the provider has kernels for the plan.

    Raises:
        BackendError: It has not, or targets are named.
    """
    if options.targets:
        raise BackendError(
            what="ONNX Runtime takes no --target.",
            why="what it runs on is the machine that it is on.",
            fix="leave it out, or use --backend rtx, which builds for GPUs that are not there.",
        )
    _refuse_unused(options)
    formats = {q.codes.name for q in plan.sites.values()}
    of_activations = {q.codes.name for site, q in plan.sites.items() if not site.endswith(".weight")}
    if options.provider in TENSORRT:
        refuse_plan(plan, targets=(), blocks=_blocks(options))
    elif "float8_e4m3fn" in formats:
        raise BackendError(
            what=f"ONNX Runtime has no FP8 matmul on `{options.provider or 'cpu'}`.",
            why="it would compute the Q/DQ as a float simulation.",
            fix="use --backend rtx or trt, or --scheme w8a8.",
        )
    elif options.provider == "cuda" and of_activations & {"int8", "uint8"}:
        raise BackendError(
            what="ONNX Runtime's CUDA provider has no INT8 matmul.",
            why="it computes Q/DQ as a float simulation, which is slower than float and no INT8 engine.",
            fix="use --provider tensorrt, --backend trt, or --scheme w4a16.",
        )
    elif options.provider in ("", "cpu") and options.body != "fp32":
        raise BackendError(
            what=f"ONNX Runtime's CPU provider does not compute in {options.body}.",
            why="its kernels are float32: the file would be smaller, the time not.",
            fix="use --float fp32, another --provider, or --backend rtx or trt.",
        )
    sizes = {q.block for q in plan.sites.values() if q.block is not None} - {*_BLOCKS}
    if sizes:
        raise BackendError(
            what=f"ONNX Runtime cannot run blocks of {max(sizes)}.",
            why=f"its MatMulNBits is used here with blocks of {', '.join(map(str, _BLOCKS))}.",
            fix="pass one of these with --block.",
        )


def _blocks(options: BuildOptions) -> tuple[int, ...]:
    return DOCUMENTED_BLOCKS if options.provider == "tensorrt" else _BLOCKS


def _refuse_unused(options: BuildOptions) -> None:
    """Return if the provider makes use of all options that are set."""
    unused = {
        "--workspace": options.workspace is not None and options.provider not in TENSORRT,
        "--optimization-level": options.level is not None and options.provider != "tensorrt",
    }
    for flag in (flag for flag, is_set in unused.items() if is_set):
        raise BackendError(
            what=f"{flag} means nothing to ONNX Runtime on `{options.provider or 'cpu'}`.",
            why="it is a setting of TensorRT's builder.",
            fix="leave it out, or use --provider tensorrt.",
        )


def prepare(model: ir.Model, plan: QuantPlan, options: BuildOptions) -> None:
    """Fences for TensorRT, and for ONNX Runtime's own kernels, which need none, the scales of blocks in float16.

    ONNX Runtime makes them float32 again when it loads the file; where blocks are small they are a fifth of it.
    """
    if options.provider in TENSORRT:
        put_fences(model, plan)
    else:
        shorten_scales(model)


def build(model: Path, plan: QuantPlan, options: BuildOptions) -> Built:
    """The census of `model`; ONNX Runtime loads the model file itself, so nothing is written on the CPU.

    Raises:
        BackendError: ONNX Runtime cannot load the model.
        ExportError: A layer that the plan quantizes is computed in float.
    """
    provider = options.provider or "cpu"
    made_for = {"onnxruntime": onnxruntime.__version__}
    if provider != "cpu":
        unknown = Census({}, {})
        try:
            OrtEngine(model, provider, options).close()
        except NotHereError as absent:
            return Built("pending", unknown, note=f"{absent.what.removesuffix('.')}: {absent.why}")
        if provider in TENSORRT:
            note = "ONNX Runtime does not say what TensorRT computes in: --backend trt does."
            return Built("built", unknown, made_for=made_for, note=note)
    found = _float_layers(plan, _operators(model, provider))
    return Built("built", Census.of(plan, found, body=options.body), made_for=made_for)


def load(model: Path, made_for: Mapping[str, str], options: BuildOptions, *, threads: int | None = None) -> OrtEngine:
    """The engine of `model` on the provider that `options` names; any version of ONNX Runtime may load it.

    Raises:
        BackendError: The file cannot be loaded, or threads are named for a GPU.
        NotHereError: The provider is not really there.
    """
    provider = options.provider or "cpu"
    if provider != "cpu":
        refuse_threads(threads)
    exact = provider == "cpu" and not _rounds_activations(model)
    return OrtEngine(model, provider, options, exact=exact, threads=threads)


def time_layers(models: Sequence[Path], layers: Iterable[str], options: BuildOptions) -> list[dict[str, float]]:
    """Milliseconds per layer in a call with one image, by model, as ONNX Runtime's profile has them.

    The sessions are as `load` makes that of an engine which mixes the models' layers.

    Raises:
        BackendError: The provider compiles the model into one node, or its profile has only what the launches of its
            kernels take; or a model cannot be loaded.
    """
    if options.provider in TENSORRT:
        raise cannot_time_layers()
    if options.provider not in ("", "cpu"):
        raise BackendError(
            what=f"ONNX Runtime does not say how long each layer takes on `{options.provider}`.",
            why="its profile has the time that a kernel's launch takes, not that of the kernel.",
            fix="pass --least size, or --provider cpu.",
        )
    exact = not any(map(_rounds_activations, models))
    return profile_layers(models, layers, [session_options(exact=exact) for _ in models])


def _float_layers(plan: QuantPlan, operators: Mapping[str, str]) -> dict[str, str]:
    """Per planned layer an empty string, or why ONNX Runtime computes it in float."""
    found = {}
    for layer in plan.layers:
        operator = operators.get(layer, "fused away")
        kernels = {_WEIGHT_ONLY_KERNEL} if is_weight_only(plan, layer) else _INTEGER_KERNELS
        computed = operator in kernels and precision_of(plan, layer) in ("int8", "int4")
        found[layer] = "" if computed else f"its node is {operator} in the graph that ONNX Runtime runs."
    return found


def _rounds_activations(model: Path) -> bool:
    """Whether `model` quantizes more than weights.

    If not, `exact` has ONNX Runtime unpack the weights once, when it loads them: at the 197 tokens of a ViT its kernels
    for INT4 and INT8 weights alone take 1.1 to 1.2 times as long as its float ones.
    """
    try:
        nodes = onnx.load(model, load_external_data=False).graph.node
    except Exception as cause:  # of protobuf's or the file system's many
        raise cannot_load(model, cause) from cause
    return any(node.op_type in ("DynamicQuantizeLinear", "QuantizeLinear") for node in nodes)


def _operators(model: Path, provider: str) -> dict[str, str]:
    """What each node is once ONNX Runtime has optimised `model`, by name."""
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        options = session_options()
        options.optimized_model_filepath = str(optimised)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "optimised.onnx.data"
        )
        try:
            providers = list(dict.fromkeys((PROVIDERS[provider], PROVIDERS["cpu"])))
            onnxruntime.InferenceSession(str(model), options, providers=providers)
        except Exception as cause:  # ONNX Runtime's own errors have no common base class
            raise cannot_load(model, cause) from cause
        graph = onnx.load(optimised, load_external_data=False).graph
    return {SERIAL_SUFFIX.sub("", node.name): node.op_type for node in graph.node}
