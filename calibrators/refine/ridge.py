"""Correction: the weight that serves the rounded inputs best, by ridge regression.

Inputs of a quantized layer carry errors, its own rounding's and those of the layers before. The least squares weight
takes back what of them can be foretold from the inputs.

Source: Zhong et al., "ERQ", arXiv 2407.06794, sec. 3.2, eq. 7: dW = (A'A + l I)^-1 A'(Y - A W), A the quantized inputs.
There `l` is a constant per model; here it is `_STRENGTH` times the mean of A'A's diagonal, so that it means the same
whatever the layer's scale, and the offset is fitted apart, unpunished.
"""

import torch

from calibrators.refine import Layer

__all__ = ["correct"]

_STRENGTH = 1.0


def correct(layer: Layer) -> None:
    """Set weight and bias to those of the ridge regression, and the weight's scales to what covers it."""
    free = 0.0 if layer.bias is None else 1.0  # without a bias the regression has no offset
    rounded = layer.inputs
    mean, target = free * rounded.mean(0), free * layer.wanted.mean(0)
    inputs = (rounded - mean).double()
    errors = (layer.wanted - target).double() - inputs @ layer.weight.T.double()
    gram = inputs.T @ inputs
    gram.diagonal().add_(_STRENGTH * float(gram.diagonal().mean()) or 1.0)
    layer.weight = layer.weight + torch.linalg.solve(gram, inputs.T @ errors).T.float()
    if layer.bias is not None:
        layer.bias = target - layer.weight @ mean
    layer.cover()
