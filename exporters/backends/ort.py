"""ONNX Runtime: runs the ONNX file itself, on the CPU or through the CUDA, TensorRT and TensorRT for RTX providers.

On the CPU, `build` lets ONNX Runtime optimise the graph and reads the result: a layer is quantized when its node has
become a quantized operator there. Where weights alone are quantized, `load` lets it unpack them once instead. CUDA runs
Q/DQ as a float simulation, so it is offered for weight-only and float models. The TensorRT providers compile the graph
with TensorRT and keep their engines in the user's cache folder; ONNX Runtime does not say what those compute in.
Whether a provider is there is asked of the session: ONNX Runtime's list has what was compiled in, with and without a
driver.
"""

import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import platformdirs

from calibrators.errors import BackendError, NotHereError
from calibrators.files import fingerprint_of, sha256_of
from calibrators.plan import QuantPlan
from exporters.backends import BuildOptions, Built, Placement
from exporters.census import Census, is_weight_only, precision_of
from exporters.scales import shorten_scales
from exporters.tensorrt.fence import put_fences
from exporters.tensorrt.refusals import cannot_time_layers, refuse_plan, refuse_threads
from exporters.timing import SERIAL_SUFFIX, profile_layers

__all__ = ["OrtEngine", "build", "check", "load", "placement", "prepare", "time_layers"]

_INTEGER_KERNELS = {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearConv", "QLinearMatMul"}
_WEIGHT_ONLY_KERNEL = "MatMulNBits"  # computes in float: where inputs are quantized it is a fall-back
_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "rtx": "NvTensorRTRTXExecutionProvider",
}
_TENSORRT = ("tensorrt", "rtx")
_TENSORRT_FORMATS = {
    "int8": onnx.TensorProto.INT8,
    "fp16": onnx.TensorProto.FLOAT16,
    "bf16": onnx.TensorProto.BFLOAT16,
}
_BLOCKS = (32, 64, 128)


class OrtEngine:
    """A model in ONNX Runtime.

    Attributes:
        provider: What really runs it: `cpu`, `cuda`, `tensorrt` or `rtx`.
    """

    def __init__(
        self,
        model: Path,
        provider: str,
        options: BuildOptions | None = None,
        *,
        exact: bool = False,
        threads: int | None = None,
    ) -> None:
        if provider not in _PROVIDERS:
            raise BackendError(
                what=f"there is no provider named `{provider}`.",
                why=f"this backend has {', '.join(_PROVIDERS)}.",
                fix="pass one of those.",
            )
        self.provider = provider
        wanted = _PROVIDERS[provider]
        if wanted not in onnxruntime.get_available_providers():
            raise _not_here(provider, onnxruntime.get_available_providers())
        chosen: list[Any] = [(wanted, _provider_options(provider, model, options or BuildOptions()))]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a missing provider, which is an error below
                self._session: onnxruntime.InferenceSession | None = onnxruntime.InferenceSession(
                    str(model),
                    session_options(exact=exact, threads=threads),
                    providers=chosen if provider == "cpu" else [*chosen, _PROVIDERS["cpu"]],
                )
        except Exception as cause:  # ONNX Runtime's own errors have no common base class
            raise _cannot_load(model, cause) from cause
        if wanted not in self._session.get_providers():
            raise _not_here(provider, self._session.get_providers())

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits (N, classes) float32 of images (N, C, H, W) float32."""
        session = self._session  # close() in another thread does not free it under this call
        if session is None:
            raise BackendError(what="the engine is closed.", why="close() was called.", fix="load it again.")
        logits: np.ndarray = session.run(None, {"images": images})[0]
        return logits

    def close(self) -> None:
        """Free the session."""
        self._session = None


def placement(options: BuildOptions) -> Placement:
    """The CPU provider fuses an INT8 convolution only with its output; its first layer costs little time there."""
    tensorrt = options.provider in _TENSORRT
    return Placement(
        first_layer=tensorrt,
        convolution_outputs=not tensorrt,
        noisy_layers=tensorrt,
        blocks=_BLOCKS,
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
    if options.provider in _TENSORRT:
        refuse_plan(plan, targets=(), blocks=_BLOCKS)
    elif "float8_e4m3fn" in formats:
        raise BackendError(
            what=f"ONNX Runtime has no FP8 matmul on `{options.provider or 'cpu'}`.",
            why="it would compute the Q/DQ as a float simulation.",
            fix="use --backend rtx or trt, or --scheme w8a8.",
        )
    elif options.provider == "cuda" and formats & {"int8", "uint8"}:
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


def _refuse_unused(options: BuildOptions) -> None:
    """Return if the provider makes use of all options that are set."""
    unused = {
        "--workspace": options.workspace is not None and options.provider not in _TENSORRT,
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
    if options.provider in _TENSORRT:
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
        if provider in _TENSORRT:
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

    Raises:
        BackendError: The provider compiles the model into one node.
    """
    if options.provider in _TENSORRT:
        raise cannot_time_layers()
    return profile_layers(models, layers, [session_options() for _ in models], [_PROVIDERS[options.provider or "cpu"]])


def session_options(*, exact: bool = False, threads: int | None = None) -> onnxruntime.SessionOptions:
    """Options of a session that computes what the file says.

    Args:
        exact: Compute Q/DQ operator by operator, in float, instead of fusing it into integer kernels.
        threads: How many compute a call; as many as there are cores if None.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: its warnings are about graphs that it rewrites anyway
    # 4, the default, would round activations to INT8 inside an INT4 weight-only matmul
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if exact:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def _provider_options(provider: str, model: Path, options: BuildOptions) -> dict[str, str]:
    if provider not in _TENSORRT:
        return {}
    # Engines are code, and the manifest vouches for all code in a bundle: they stay outside it.
    weights = model.with_name(f"{model.name}.data")
    key = fingerprint_of([sha256_of(file) for file in (model, weights) if file.exists()])
    cache = str(platformdirs.user_cache_path("dfq-deploy", ensure_exists=True) / f"ort-{key[:16]}")
    prefix = "nv" if provider == "rtx" else "trt"
    graph = onnx.load(model, load_external_data=False).graph
    (images,) = graph.input
    image = "x".join(str(size.dim_value) for size in images.type.tensor_type.shape.dim[1:])
    found = {
        f"{prefix}_profile_{end}_shapes": f"{images.name}:{size}x{image}"
        for end, size in zip(("min", "opt", "max"), options.batch, strict=True)
    }
    if options.workspace is not None:
        found[f"{prefix}_max_workspace_size"] = str(options.workspace)
    if provider == "rtx":
        return {**found, "nv_runtime_cache_path": cache}
    if options.level is not None:
        found["trt_builder_optimization_level"] = str(options.level)
    formats = {tensor.data_type for tensor in graph.initializer}
    for name, wanted in _TENSORRT_FORMATS.items():  # TensorRT 10 asks to be told what Q/DQ and types say already
        found[f"trt_{name}_enable"] = str(int(wanted in formats))
    kept = {"trt_engine_cache_path": cache, "trt_timing_cache_path": cache}
    return {**found, **kept, "trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"}


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
        raise _cannot_load(model, cause) from cause
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
            providers = list(dict.fromkeys((_PROVIDERS[provider], _PROVIDERS["cpu"])))
            onnxruntime.InferenceSession(str(model), options, providers=providers)
        except Exception as cause:  # ONNX Runtime's own errors have no common base class
            raise _cannot_load(model, cause) from cause
        graph = onnx.load(optimised, load_external_data=False).graph
    return {SERIAL_SUFFIX.sub("", node.name): node.op_type for node in graph.node}


def _not_here(provider: str, there: list[str]) -> NotHereError:
    package = "a build with TensorRT for RTX" if provider == "rtx" else "onnxruntime-gpu, with its libraries,"
    return NotHereError(
        what=f"ONNX Runtime does not run on `{provider}` here.",
        why=f"it has {', '.join(name for name, provider in _PROVIDERS.items() if provider in there)}.",
        fix=f"install {package} in place of onnxruntime, or use --provider cpu.",
    )


def _cannot_load(model: Path, cause: Exception) -> BackendError:
    return BackendError(
        what=f"ONNX Runtime {onnxruntime.__version__} cannot load `{model}`.",
        why=str(cause).strip().split("\n")[0],
        fix="export the model again with this version of ONNX Runtime, or try another --scheme.",
    )
