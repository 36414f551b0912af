"""What we want of a quantized model: number formats, as a value.

A `QuantScheme` says which integer formats weights and activations get. It knows no model and no run-time.
"""

from dataclasses import dataclass

from calibrators.affine import CODES, IntCodes
from calibrators.errors import RecipeError

__all__ = ["SCHEMES", "QuantScheme", "scheme_named"]


@dataclass(frozen=True)
class QuantScheme:
    """Number formats of one quantized model.

    Weights are symmetric per output channel; activations have one scale per tensor.
    """

    name: str
    weight: IntCodes
    activation: IntCodes
    note: str


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        QuantScheme("w8a8", CODES["int8"], CODES["int8"], "symmetric INT8, portable to TensorRT and ONNX Runtime"),
        QuantScheme("w8a8_asym", CODES["int8"], CODES["uint8"], "INT8 weights, asymmetric UINT8 activations, ORT only"),
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
