"""Sites that can be learned through: rounding with a gradient, and scales that are parameters.

What passes a site is rounded as always, by `calibrators.affine`. Backwards, rounding counts as the identity within the
range and as nothing beyond it, and scale and zero-point get the gradient that this gives them. Here a plan becomes
parameters, and parameters a plan again. A dynamic site has none: its scale is found anew, and nothing lies beyond its
range.

Source: Esser et al., "Learned Step Size Quantization", arXiv 1902.08153, sec. 2.1, eq. 3; Bhalgat et al., "LSQ+",
arXiv 2004.09576, for the zero-point. Steps are set per group by the optimizer, not by scaling gradients.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calibrators.affine import Codes, fake_quantize
from calibrators.plan import QParams, shortened
from calibrators.sites import Mode, SitedConv2d, SitedLinear, rounded, set_mode, sites_of

__all__ = ["Learned"]


class Learned:
    """A module whose planned sites round with parameters, until `settle` makes a plan of them.

    Attributes:
        scales: Scale per site, shaped to broadcast against what passes.
        zeros: Zero-point of each asymmetric site, not rounded.

    Args:
        module: Changed in place: all its parameters can be learned, and its sites round.
        plan: Number formats by site; those of other modules may be among them.
    """

    def __init__(self, module: nn.Module, plan: Mapping[str, QParams]) -> None:
        self._module = module
        self._sites = {name: site for name, site in sites_of(module).items() if name in plan}
        self._plan = {name: plan[name] for name in self._sites}
        self.scales: dict[str, nn.Parameter] = {}
        self.zeros: dict[str, nn.Parameter] = {}
        device = next(module.parameters()).device
        module.requires_grad_(True)
        set_mode(module, Mode.FAKE, qparams=self._plan)
        for name, site in self._sites.items():
            qparams = self._plan[name]
            if qparams.dynamic:
                site.round_with(functools.partial(_straight_through, qparams))
                continue
            parts = (qparams.scale, qparams.zero_point.astype(np.float32)) if qparams.block else qparams.along(2)
            scale, zero = (torch.from_numpy(part).to(device) for part in parts)
            self.scales[name] = nn.Parameter(scale.clone(), requires_grad=qparams.codes.integers)
            if qparams.codes.integers and not qparams.codes.signed:
                self.zeros[name] = nn.Parameter(zero.clone())
            site.round_with(self._rounding(name, qparams.codes, qparams.block or 1))

    def _rounding(self, name: str, codes: Codes, block: int) -> Callable[[Tensor], Tensor]:
        scale = self.scales[name]
        zero = self.zeros.get(name, torch.zeros(()))

        def rounding(values: Tensor) -> Tensor:
            rows = values.flatten(1) if scale.ndim else values  # a weight's, with a scale each, or one per block
            steps, zeros = (
                part.repeat_interleave(block, 1) if block > 1 and part.ndim else part for part in (scale, zero)
            )
            found: Tensor = _Rounding.apply(rows.float(), steps, zeros, codes)
            return found.view_as(values).to(values.dtype)

        return rounding

    def settle(self) -> dict[str, QParams]:
        """The plan of what was learned; the weights are put on their codes and can no longer be learned."""
        self._module.requires_grad_(False)
        found = dict(self._plan)
        for name, learned in self.scales.items():
            qparams = self._plan[name]
            scale = np.array(learned.detach().abs().numpy().reshape(qparams.scale.shape), np.float32)
            scale = shortened(scale) if qparams.block else scale
            zero = qparams.zero_point
            if name in self.zeros:
                zero = self.zeros[name].detach().round().clamp(qparams.codes.lowest, qparams.codes.high).numpy()
                zero = zero.reshape(qparams.zero_point.shape).astype(qparams.codes.zero_dtype)
            found[name] = replace(qparams, scale=scale, zero_point=np.asarray(zero))
        set_mode(self._module, Mode.FAKE, qparams=found)
        for layer in self._module.modules():
            if isinstance(layer, SitedLinear | SitedConv2d) and layer.weight_site.name in found:
                layer.weight.data = layer.weight_site(layer.weight.data)
        return found


def _straight_through(qparams: QParams, values: Tensor) -> Tensor:
    return values + (rounded(values.detach(), qparams) - values.detach())


class _Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero: Tensor, codes: Codes) -> Tensor:
        scale = scale.abs()
        found: Tensor = fake_quantize(values, scale, zero.round().clamp(codes.lowest, codes.high), codes)
        ctx.integers = codes.integers
        learned = any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(*((values, found, scale) if learned else (_inside(values, found, scale),)))
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if not ctx.integers:
            return gradient, None, None, None
        if not any(ctx.needs_input_grad[1:3]):
            return gradient * ctx.saved_tensors[0], None, None, None
        values, found, scale = ctx.saved_tensors
        kept = gradient * _inside(values, found, scale)
        to_scale = to_zero = None
        if ctx.needs_input_grad[1]:
            to_scale = (gradient * found - kept * values).sum_to_size(scale.shape) / scale
        if ctx.needs_input_grad[2]:
            to_zero = (kept - gradient).sum_to_size(scale.shape) * scale
        return kept, to_scale, to_zero, None


def _inside(values: Tensor, found: Tensor, scale: Tensor) -> Tensor:
    """Where rounding `values` to `found` did not cut them off."""
    return (found - values).abs_() <= 0.5001 * scale
