"""ONNX Runtime: runs the ONNX file itself, on the CPU or on CUDA.

`build` lets ONNX Runtime optimise the graph and reads the result: a layer is integer when its node has become an
integer operator there. Integer layers run on the CPU provider; CUDA runs Q/DQ as a float simulation.
"""

import re
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from calibrators.errors import BackendError
from calibrators.plan import QuantPlan
from exporters.census import Census

__all__ = ["OrtEngine", "build", "check", "load"]

_INTEGER_OPS = {"MatMulIntegerToFloat", "QLinearConv", "QLinearMatMul"}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_SERIAL_SUFFIX = re.compile(r"_token_\d+$")  # what ONNX Runtime appends when it renames a fused node


class OrtEngine:
    """A model in ONNX Runtime.

    Attributes:
        provider: What really runs it: `cpu` or `cuda`.
    """

    def __init__(self, model: Path, provider: str) -> None:
        if provider not in _PROVIDERS:
            raise BackendError(
                what=f"there is no provider named `{provider}`.",
                why=f"this backend has {', '.join(_PROVIDERS)}.",
                fix="pass one of those.",
            )
        self.provider = provider
        wanted = _PROVIDERS[provider]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a missing provider, which is an error below
                self._session: onnxruntime.InferenceSession | None = onnxruntime.InferenceSession(
                    str(model), _quiet(), providers=[wanted] if provider == "cpu" else [wanted, _PROVIDERS["cpu"]]
                )
        except Exception as cause:  # ONNX Runtime's own errors have no common base class
            raise BackendError(
                what=f"ONNX Runtime {onnxruntime.__version__} cannot load `{model}`.",
                why=str(cause).strip().split("\n")[0],
                fix="export the model again with this version of ONNX Runtime.",
            ) from cause
        if wanted not in self._session.get_providers():
            raise BackendError(
                what=f"ONNX Runtime does not run on `{provider}` here.",
                why=f"the session has {', '.join(self._session.get_providers())}.",
                fix="install onnxruntime-gpu in place of onnxruntime, with its CUDA libraries, or use --provider cpu.",
            )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits (N, classes) float32 of images (N, C, H, W) float32."""
        if self._session is None:
            raise BackendError(what="the engine is closed.", why="close() was called.", fix="load it again.")
        logits: np.ndarray = self._session.run(None, {"images": images})[0]
        return logits

    def close(self) -> None:
        """Free the session."""
        self._session = None


def check(plan: QuantPlan) -> None:
    """Return: ONNX Runtime runs every scheme that there is."""


def build(model: Path, plan: QuantPlan) -> Census:
    """The census of `model` as the CPU provider runs it.

    Raises:
        BackendError: ONNX Runtime cannot load the model.
        ExportError: A layer that the plan quantizes is computed in float.
    """
    integer = _integer_nodes(model)
    why = "its node is not an integer operator in the graph that ONNX Runtime runs."
    return Census.of(plan, {layer: "" if layer in integer else why for layer in plan.layers})


def load(model: Path, *, provider: str = "cpu") -> OrtEngine:
    """The engine of `model` on `cpu` or `cuda`.

    Raises:
        BackendError: The file cannot be loaded, or the provider is not really there.
    """
    return OrtEngine(model, provider)


def _integer_nodes(model: Path) -> set[str]:
    """Names of the nodes that are integer operators once ONNX Runtime has optimised `model`."""
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        options = _quiet()
        options.optimized_model_filepath = str(optimised)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "optimised.onnx.data"
        )
        try:
            onnxruntime.InferenceSession(str(model), options, providers=[_PROVIDERS["cpu"]])
        except Exception as cause:  # ONNX Runtime's own errors have no common base class
            raise BackendError(
                what=f"ONNX Runtime {onnxruntime.__version__} cannot load the exported model.",
                why=str(cause).strip().split("\n")[0],
                fix="try another --scheme, or report this model.",
            ) from cause
        graph = onnx.load(optimised, load_external_data=False).graph
    return {_SERIAL_SUFFIX.sub("", node.name) for node in graph.node if node.op_type in _INTEGER_OPS}


def _quiet() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: its warnings are about graphs that it rewrites anyway
    return options
