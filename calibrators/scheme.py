"""What we want of a quantized model: number formats, as a value.

A `QuantScheme` says which formats weights and activations get. It knows no model and no run-time.
"""

from dataclasses import dataclass

from calibrators.affine import CODES, Codes
from calibrators.errors import RecipeError

__all__ = ["SCHEMES", "QuantScheme", "scheme_named"]


@dataclass(frozen=True)
class QuantScheme:
    """Number formats of one quantized model.

    Weights have a scale per output channel, or per block of input channels within one; activations have one per tensor.

    Attributes:
        name: What `--scheme` calls it.
        weight: Format of weights; None leaves the whole model in float.
        activation: Format of activations; None leaves them in float.
        blocked: Weights have a scale per block (`--block`). Only matrices can: convolutions stay in float.
        observer: The observer that `--observer auto` stands for.
        refine: The refine passes that `--refine default` stands for.
        note: For people.
        dynamic: The run-time finds the scales of activations anew for each tensor.
        simulated: No run-time has kernels for it: it is computed in PyTorch only, to see what it would be worth. The
            operands of attention matmuls are quantized too, and the ends of the model to 8 bits.
        softmax: Format of what a softmax puts out; None if that of any activation.
    """

    name: str
    weight: Codes | None
    activation: Codes | None
    blocked: bool
    observer: str
    refine: tuple[str, ...]
    note: str
    dynamic: bool = False
    simulated: bool = False
    softmax: Codes | None = None


_INT8, _UINT8, _INT4, _FP8 = (CODES[name] for name in ("int8", "uint8", "int4", "float8_e4m3fn"))
_UINT4, _INT6, _UINT6 = (CODES[name] for name in ("uint4", "int6", "uint6"))
_EIGHT = ("rotate", "smooth", "reach", "gptq")  # default passes for 8 bits, and for fewer
_FEWER = ("rotate", "smooth", "clip", "gptq", "bias")

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        QuantScheme("w8a8", _INT8, _INT8, False, "percentile", _EIGHT, "symmetric INT8, portable"),
        QuantScheme(
            "w8a8_asym", _INT8, _UINT8, False, "percentile", _EIGHT, "INT8 weights, asymmetric UINT8 inputs, ORT"
        ),
        QuantScheme(
            "w8a8_dynamic",
            _INT8,
            _UINT8,
            False,
            "minmax",
            ("smooth",),
            "INT8 weights, UINT8 inputs scaled anew in every call, ORT",
            dynamic=True,
        ),
        QuantScheme("w8a8_fp8", _FP8, _FP8, False, "minmax", (), "FP8 (E4M3), for GPUs from SM89 on"),
        QuantScheme("w4a16", _INT4, None, True, "minmax", ("gptq",), "INT4 weights, float activations"),
        QuantScheme("w4a8", _INT4, _UINT8, False, "mse", _FEWER, "INT4 weights, UINT8 activations", simulated=True),
        QuantScheme("w6a6", _INT6, _UINT6, False, "mse", _FEWER, "6 bits", simulated=True, softmax=CODES["log2_uint6"]),
        QuantScheme("w4a4", _INT4, _UINT4, False, "mse", _FEWER, "4 bits", simulated=True, softmax=CODES["log2_uint4"]),
        QuantScheme("float", None, None, False, "minmax", (), "nothing quantized: what the others are compared with"),
    )
}


def scheme_named(name: str) -> QuantScheme:
    """The preset called `name`.

    Raises:
        RecipeError: There is no such preset.
    """
    if name not in SCHEMES:
        raise RecipeError(
            what=f"there is no scheme named `{name}`.",
            why=f"the presets are {', '.join(SCHEMES)}.",
            fix="pass one of them with --scheme.",
        )
    return SCHEMES[name]
