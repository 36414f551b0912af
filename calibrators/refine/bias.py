"""Correction: rounding moves the mean of a layer's outputs; the bias takes that back.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721, sec.
4.2, eq. 17, the empirical form: with calibration images in place of the statistics of a BatchNorm.
"""

from calibrators.refine import Layer

__all__ = ["correct"]


def correct(layer: Layer) -> None:
    """Set the bias, if there is one, such that the mean of the quantized layer's outputs is the float model's."""
    if layer.bias is not None:  # one more would be one more operator
        layer.bias = layer.wanted.mean(0) - layer.rounded() @ layer.inputs.mean(0)
