"""Sites: the named places of a torch model where a tensor may be quantized.

`attach_sites` gives every Linear and Conv2d an input site and a weight site (a convolution an output site too:
run-times fuse an INT8 convolution only when its output is quantized as well). A site lets its tensor pass
(`off`), watches it (`observe`), rounds it as an engine would (`fake`), or leaves a marker node in an ONNX export
(`mark`). Attention families add sites for the operands of their two matmuls. The name of a site is its key in
ranges and plans and the name of the tensor in ONNX.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibrators.affine import choose_qparams, fake_quantize
from calibrators.observers import MinMax, Observer
from calibrators.plan import QParams
from calibrators.ranges import SiteRange

__all__ = [
    "MARKER",
    "Mode",
    "OperandSites",
    "QuantSite",
    "Role",
    "SitedConv2d",
    "SitedLinear",
    "attach_sites",
    "block_ranges",
    "channel_weights",
    "fitting_block",
    "rounded",
    "set_mode",
    "sites_of",
]

Role = Literal["input", "weight", "output", "operand"]
MARKER = "dfq::Site"


class Mode(Enum):
    """What a site does with the tensor that passes it."""

    OFF = "off"
    OBSERVE = "observe"
    FAKE = "fake"
    MARK = "mark"


class QuantSite(nn.Module):
    """One named place; `mode` says what happens there.

    Attributes:
        name: `blocks.3.attn.qkv.input`; the same in torch, ranges, plan, ONNX and reports.
        role: What passes: a layer's input, weight or output, or an attention matmul's operand.
        axis: The axis with one scale per index, or None for one scale per tensor.
        fixed: The range by definition, such as (0, 1) for a softmax's output; it is not observed.
        shape: The shape that last passed under `observe`; None where nothing has.
        broken: First row, along the outermost axis, with NaN or Inf of the first tensor with one under `observe`.
    """

    def __init__(
        self, name: str, role: Role, axis: int | None = None, fixed: tuple[float, float] | None = None
    ) -> None:
        super().__init__()
        self.name = name
        self.role: Role = role
        self.axis = axis
        self.fixed = fixed
        self.mode = Mode.OFF
        self.observer: Observer | None = None
        self.shape: tuple[int, ...] | None = None
        self.broken: int | None = None
        self._fake: Callable[[Tensor], Tensor] | None = None

    def forward(self, values: Tensor) -> Tensor:
        """`values`, of the same shape and dtype, treated as the mode says."""
        if self.mode is Mode.OBSERVE:
            assert self.observer is not None
            self.observer.update(values)
            self.shape = tuple(values.shape)
            if self.broken is None and not self.observer.finite:
                self.broken = int((~values.isfinite()).flatten(1).any(1).int().argmax())
        elif self.mode is Mode.FAKE and self._fake is not None:
            return self._fake(values)
        elif self.mode is Mode.MARK:
            marked: Tensor = torch.onnx.ops.symbolic(
                MARKER, [values], attrs={"name": self.name}, dtype=values.dtype, shape=values.shape, version=1
            )
            return marked
        return values

    @property
    def active(self) -> bool:
        """Whether the site does more than let its tensor pass."""
        return self.mode in (Mode.OBSERVE, Mode.MARK) or (self.mode is Mode.FAKE and self._fake is not None)

    def set_qparams(self, qparams: QParams | None) -> None:
        """What `fake` rounds to; None lets the tensor pass."""
        if qparams is None:
            self._fake = None
            return
        self._fake = functools.partial(rounded, qparams=qparams)

    def round_with(self, rounding: Callable[[Tensor], Tensor]) -> None:
        """Round by `rounding` under `fake`, until qparams are set again."""
        self._fake = rounding


class OperandSites(nn.Module):
    """The four operands of one attention's matmuls: scaled Q and Kᵀ, softmax and V."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.qk_lhs = QuantSite(f"{attention}.qk.lhs", "operand")
        self.qk_rhs = QuantSite(f"{attention}.qk.rhs", "operand")
        self.av_lhs = QuantSite(f"{attention}.av.lhs", "operand", fixed=(0.0, 1.0))
        self.av_rhs = QuantSite(f"{attention}.av.rhs", "operand")

    @property
    def active(self) -> bool:
        """Whether any of them does more than let its tensor pass."""
        return any(site.active for site in (self.qk_lhs, self.qk_rhs, self.av_lhs, self.av_rhs))


class SitedLinear(nn.Linear):
    """A Linear whose input and weight pass a site each."""

    input_site: QuantSite
    weight_site: QuantSite

    def forward(self, x: Tensor) -> Tensor:
        """The Linear's output, (…, out_features)."""
        return F.linear(self.input_site(x), self.weight_site(self.weight), self.bias)


class SitedConv2d(nn.Conv2d):
    """A Conv2d whose input, weight and output pass a site each."""

    input_site: QuantSite
    weight_site: QuantSite
    output_site: QuantSite

    def forward(self, x: Tensor) -> Tensor:
        """The convolution's output, (N, out_channels, H, W)."""
        y = self._conv_forward(self.input_site(x), self.weight_site(self.weight), self.bias)
        return self.output_site(y)  # type: ignore[no-any-return]


def rounded(values: Tensor, qparams: QParams) -> Tensor:
    """`values` as they come back from the codes of `qparams`, same shape and dtype."""
    if qparams.dynamic:
        low, high = (end.cpu().numpy() for end in values.float().aminmax())
        scales, zeros = choose_qparams(low, high, qparams.codes)
        qparams = replace(qparams, scale=scales, zero_point=zeros)
    scale, zero = (torch.from_numpy(part).to(values.device) for part in qparams.along(values.ndim))
    found: Tensor = fake_quantize(values.float(), scale, zero, qparams.codes)
    return found.to(values.dtype)


def attach_sites(module: nn.Module, leave: Collection[str] = (), only: Collection[str] | None = None) -> None:
    """Give every plain Linear and Conv2d of `module` its sites, in place; weights and state keys stay as they are.

    Subclasses with a forward of their own keep it and get no site, and neither do the layers that `leave` names, nor
    convolutions that pad one side more than the other: an exporter makes several operators of them. Where `only` is
    given, it names all that get sites.
    """
    for name, layer in list(module.named_modules()):
        if name in leave or (only is not None and name not in only):
            continue
        if type(layer) is nn.Linear:
            layer.__class__ = SitedLinear  # keeps parameters, hooks and every reference to the layer
        elif type(layer) is nn.Conv2d and not _pads_unevenly(layer):
            layer.__class__ = SitedConv2d
            layer.output_site = QuantSite(f"{name}.output", "output")
        else:
            continue
        layer.input_site = QuantSite(f"{name}.input", "input")
        layer.weight_site = QuantSite(f"{name}.weight", "weight", axis=0)


def _pads_unevenly(layer: nn.Conv2d) -> bool:
    reach = [(size - 1) * step for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    return layer.padding == "same" and any(pixels % 2 for pixels in reach)


def sites_of(module: nn.Module) -> dict[str, QuantSite]:
    """All sites of `module` by name, in the order of its layers."""
    return {site.name: site for site in module.modules() if isinstance(site, QuantSite)}


def fitting_block(width: int, blocks: Sequence[int]) -> int | None:
    """The largest of `blocks` of which two or more whole ones make up `width` input channels, or None."""
    return max((block for block in blocks if width % block == 0 and width > block), default=None)


def block_ranges(module: nn.Module, blocks: Sequence[int]) -> dict[str, SiteRange]:
    """Ranges of the weight sites of `module` by blocks of input channels, of the size in `blocks` that fits each."""
    found = {}
    for layer in module.modules():
        if isinstance(layer, SitedLinear) and (block := fitting_block(layer.in_features, blocks)):
            weights = layer.weight.detach().float().cpu().reshape(layer.out_features, -1, block)
            low, high = (bound.numpy() for bound in (weights.amin(2), weights.amax(2)))
            found[layer.weight_site.name] = SiteRange(low, high, "weight", 0, tuple(layer.weight.shape), block)
    return found


def channel_weights(module: nn.Module) -> dict[str, Tensor]:
    """What a squared error in each channel of a layer's input adds to that of its output, by the input's site.

    The squared norm of the weight's column, summed over a convolution's window: (in_features,) or (in_channels, 1, 1),
    which broadcast against the input, float64.
    """
    found = {}
    for layer in module.modules():
        if isinstance(layer, SitedLinear):
            found[layer.input_site.name] = layer.weight.detach().double().square().sum(0)
        elif isinstance(layer, SitedConv2d):
            squares = layer.weight.detach().double().square()
            groups = squares.reshape(layer.groups, -1, *squares.shape[1:])
            found[layer.input_site.name] = groups.sum((1, 3, 4)).reshape(-1, 1, 1)
    return found


def set_mode(
    module: nn.Module,
    mode: Mode,
    *,
    qparams: Mapping[str, QParams] | None = None,
    observer: Callable[[str], Observer] | None = None,
) -> None:
    """Switch all sites of `module`.

    Args:
        module: A model with sites.
        mode: What they do from now on.
        qparams: For `fake`: what each site rounds to; sites that are not named let their tensor pass.
        observer: For `observe`: makes an activation site's observer, by name. Weights get a per-channel MinMax.
    """
    for site in sites_of(module).values():
        site.mode = mode
        site.set_qparams(qparams.get(site.name) if qparams and mode is Mode.FAKE else None)
        if mode is Mode.OBSERVE:
            assert observer is not None
            site.observer = MinMax(site.axis) if site.role == "weight" else observer(site.name)
            site.shape = site.broken = None
