"""The reference: what a plan means, computed by the torch model with fake quantization.

The same plan that goes into ONNX rounds the same tensors here. The reference is what an engine must agree with; the
float model is what both are compared to. What a plan leaves in float is computed in float, with one exception: a
convolution whose output is quantized is computed in integers as a whole, and so its bias is one, too.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calibrators.errors import PlanError
from calibrators.plan import QuantPlan
from calibrators.scheme import SCHEMES
from calibrators.sites import Mode, QuantSite, SitedConv2d, set_mode, sites_of
from dfq_deploy.models import Model
from exporters.census import Body

__all__ = ["Reference", "float_rows"]

_MOVE = 1e-6  # relative; about eight float32 roundings
_BODIES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def float_rows(model: Model, images: np.ndarray) -> np.ndarray:
    """What `model` puts out as it is, all outputs side by side: (N, numbers) float32; a classifier's are its logits."""
    with torch.inference_mode():
        rows: np.ndarray = model.rows(torch.from_numpy(images)).numpy()
    return rows


class Reference:
    """A torch model that computes in float, or as its plan says.

    Attributes:
        plan: The plan.
        model: The model with the weights that the plan is for.

    Args:
        model: The model with the weights that the plan is for.
        plan: The plan.
        floats: The model that counts as float, where refine passes changed the weights; else it is `model`.

    Raises:
        PlanError: The plan was made for another model.
    """

    def __init__(self, model: Model, plan: QuantPlan, floats: Model | None = None) -> None:
        if plan.model != model.fingerprint or not plan.sites.keys() <= sites_of(model.module).keys():
            raise PlanError(
                what=f"the plan does not belong to `{model.name}` with these weights.",
                why="its fingerprint names another model.",
                fix="make the plan again, or pass the --checkpoint that it was made with.",
            )
        self.model, self._module = model, model.module
        self._floats = floats or model
        self._biases = list(_rounded_biases(model.module, plan))
        self.plan = plan

    def float(self, images: np.ndarray) -> np.ndarray:
        """What the float model puts out, (N, numbers) float32: its outputs side by side, as all below."""
        return float_rows(self._floats, images)

    def quantized(self, images: np.ndarray) -> np.ndarray:
        """What comes out under the plan, (N, numbers) float32."""
        return self._run(images)

    def moved(self, images: np.ndarray, generator: torch.Generator, body: Body) -> np.ndarray:
        """What comes out under the plan when nothing that matters is changed: the yardstick for an engine's distance.

        With a float32 body the input is moved by a relative 1e-6; where the first layer rounds its input, 1e-6 would
        vanish there, and its output is moved instead. With another body, what each module puts out is rounded to it.
        """
        if body != "fp32":
            return self._rounded(images, _BODIES[body])

        def move(values: Tensor) -> Tensor:
            return values * (1 + _MOVE * torch.randn(values.shape, generator=generator))

        if f"{self.model.first}.input" not in self.plan.sites:
            return self._run(move(torch.from_numpy(images)).numpy())
        layer = self._module.get_submodule(self.model.first)
        hook = layer.register_forward_hook(lambda _layer, _inputs, output: move(output))
        try:
            return self._run(images)
        finally:
            hook.remove()

    def _rounded(self, images: np.ndarray, dtype: torch.dtype) -> np.ndarray:
        """What comes out under the plan with the output of every module but the sites rounded to `dtype`."""

        def round_off(_module: nn.Module, _inputs: object, output: Any) -> Any:
            return output.to(dtype).to(output.dtype) if isinstance(output, Tensor) else output

        modules = [module for module in self._module.modules() if not isinstance(module, QuantSite)]
        hooks = [module.register_forward_hook(round_off) for module in modules]
        try:
            return self._run(images)
        finally:
            for hook in hooks:
                hook.remove()

    def watch_layers(self, images: np.ndarray, see: Callable[[str, list[np.ndarray], np.ndarray], None]) -> None:
        """Run `images` under the plan and show `see` each planned layer: name, operands before rounding, output."""
        hooks = []
        for layer in self.plan.layers:
            if f"{layer}.lhs" in self.plan.sites:  # an attention's matmul
                attention, _, matmul = layer.rpartition(".")
                sites = self._module.get_submodule(attention).sites
                pair = getattr(sites, f"{matmul}_lhs"), getattr(sites, f"{matmul}_rhs")
                hooks += _watch_matmul(layer, pair, see)
            else:
                hooks.append(self._module.get_submodule(layer).register_forward_hook(_watch_layer(layer, see)))
        try:
            self._run(images)
        finally:
            for hook in hooks:
                hook.remove()

    def _run(self, images: np.ndarray) -> np.ndarray:
        with ExitStack() as stack, torch.inference_mode():
            set_mode(self._module, Mode.FAKE, qparams=self.plan.sites)
            stack.callback(set_mode, self._module, Mode.OFF)
            for site, change in self._biases:
                hook = site.register_forward_pre_hook(lambda _site, inputs, change=change: (inputs[0] + change,))
                stack.callback(hook.remove)
            rows: np.ndarray = self.model.rows(torch.from_numpy(images)).numpy()
        return rows


def _rounded_biases(module: nn.Module, plan: QuantPlan) -> Iterator[tuple[QuantSite, Tensor]]:
    """The output sites of convolutions that an engine computes in integers, and what rounding the bias changes there.

    The bias is added to sums of products of codes, so its step is the input's scale times the weight's. That moves
    about one code per image of a small ViT's patch embedding, which is several noise floors. Formats that no run-time
    has kernels for have no such bias.

    Yields:
        A site, and the change (channels, 1, 1).
    """
    if plan.scheme in SCHEMES and SCHEMES[plan.scheme].simulated:
        return
    for layer, conv in module.named_modules():
        planned = [plan.sites.get(f"{layer}.{site}") for site in ("input", "weight", "output")]
        if isinstance(conv, SitedConv2d) and conv.bias is not None and all(planned):
            left, right = (torch.from_numpy(site.scale) for site in planned[:2] if site)
            bias, step = conv.bias.detach(), left * right
            yield conv.output_site, (torch.round(bias / step) * step - bias).reshape(-1, 1, 1)


def _watch_layer(
    name: str, see: Callable[[str, list[np.ndarray], np.ndarray], None]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    return lambda _layer, inputs, output: see(name, [inputs[0].numpy()], output.numpy())


def _watch_matmul(
    name: str, pair: tuple[nn.Module, nn.Module], see: Callable[[str, list[np.ndarray], np.ndarray], None]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks on the two operand sites; the second one, called last, has what the matmul needs."""
    passed: list[tuple[Tensor, Tensor]] = []

    def keep(_site: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        passed.append((inputs[0], output))
        if len(passed) == 2:
            (left, left_rounded), (right, right_rounded) = passed
            passed.clear()
            see(
                name,
                [left.contiguous().numpy(), right.contiguous().numpy()],
                (left_rounded @ right_rounded).numpy(),
            )

    return [site.register_forward_hook(keep) for site in pair]
