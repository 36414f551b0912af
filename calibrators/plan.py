"""The plan: one number format per site, the artefact that everything downstream is a pure function of.

`Ranges` (what was seen) and a `QuantScheme` (what is wanted) give a `QuantPlan` (scales and zero-points, and the
reason for each site that stays float). It is kept as a safetensors file, which README specifies. No torch.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibrators.affine import CODES, Codes, choose_qparams
from calibrators.errors import PlanError
from calibrators.files import fingerprint_of
from calibrators.plan_file import block_entry, check_texts, is_placed, load_tensors, malformed, save_tensors
from calibrators.ranges import Ranges, SiteRange
from calibrators.scheme import QuantScheme

__all__ = ["QParams", "QuantPlan", "layer_of", "make_plan", "shortened"]


def layer_of(site: str) -> str:
    """The layer that a site belongs to: `head.input` -> `head`; `blocks.0.attn.qk.lhs` -> `blocks.0.attn.qk`."""
    return site.rpartition(".")[0]


@dataclass(frozen=True)
class QParams:
    """How one site is quantized.

    Attributes:
        scale: float32, positive: a scalar, (n,) along `axis`, or (n, K / block) for blocks of a matrix's K columns.
        zero_point: The code that stands for 0, same shape as `scale`, of dtype `codes.zero_dtype`.
        codes: The number format.
        axis: The axis with one scale per index, in torch's layout of the tensor, or None.
        block: Columns that share a scale, or None.
        dynamic: The run-time finds both anew, from the ends of each tensor that passes; `scale` and `zero_point` are
            what the calibration images gave.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    codes: Codes
    axis: int | None
    block: int | None = None
    dynamic: bool = False

    def along(self, ndim: int) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero-point (float32 both), shaped to broadcast against the `ndim`-dimensional tensor."""
        scale, zero = self.scale, self.zero_point.astype(np.float32)
        if self.block is not None:
            return np.repeat(scale, self.block, axis=1), np.repeat(zero, self.block, axis=1)
        if self.axis is None:
            return scale, zero
        shape = [1] * ndim
        shape[self.axis] = -1
        return scale.reshape(shape), zero.reshape(shape)


@dataclass(frozen=True)
class QuantPlan:
    """What is quantized and how, and what is not, or otherwise than was asked for, and why.

    Attributes:
        sites: Quantized sites by name.
        spared: Sites that stay float or, where they are among `sites`, get more than was asked for, with the reason.
        scheme: Name of the scheme.
        model: Fingerprint of the model's name and weights.
        images: Fingerprint of the calibration images.
    """

    sites: Mapping[str, QParams]
    spared: Mapping[str, str]
    scheme: str
    model: str
    images: str

    @property
    def layers(self) -> list[str]:
        """The layers and matmuls that are quantized, in the model's order."""
        return list(dict.fromkeys(layer_of(site) for site in self.sites))

    def codes_of(self, layer: str) -> Codes:
        """The format that `layer` is quantized to: its weight's, or that of an attention matmul's operands."""
        site = f"{layer}.weight" if f"{layer}.weight" in self.sites else f"{layer}.lhs"
        return self.sites[site].codes

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that the plan says."""
        values = {name: [_facts(q), q.scale.tolist(), q.zero_point.tolist()] for name, q in self.sites.items()}
        return fingerprint_of([values, dict(self.spared), self.scheme, self.model, self.images])

    def save(self, path: Path) -> None:
        """Write `<site>.scale` and `<site>.zero_point` tensors and a JSON header; the same plan, the same bytes."""
        tensors = {f"{n}.{part}": getattr(q, part) for n, q in self.sites.items() for part in ("scale", "zero_point")}
        sites = {name: _facts(q) for name, q in self.sites.items()}
        facts = {
            "scheme": self.scheme,
            "model": self.model,
            "images": self.images,
            "spared": dict(self.spared),
        }
        save_tensors(path, "dfq_plan", tensors, {**facts, "sites": sites})

    @classmethod
    def load(cls, path: Path) -> "QuantPlan":
        """The plan in the file `path`.

        Raises:
            PlanError: The file is missing, damaged or of another format, or holds an unusable scale.
        """
        tensors, header = load_tensors(path, "dfq_plan")
        try:
            sites = {
                name: QParams(
                    tensors[f"{name}.scale"],
                    tensors[f"{name}.zero_point"],
                    CODES[s["codes"]],
                    s["axis"],
                    s.get("block"),
                    s.get("dynamic", False),
                )
                for name, s in header["sites"].items()
            }
            plan = cls(sites, header["spared"], header["scheme"], header["model"], header["images"])
            check_texts([*plan.spared, *plan.spared.values(), plan.scheme, plan.model, plan.images])
        except (AttributeError, KeyError, TypeError) as cause:
            raise malformed(path, cause) from cause
        for name, q in plan.sites.items():
            whole = q.scale.dtype == np.float32 and q.zero_point.dtype == q.codes.zero_dtype
            whole &= is_placed(q.scale, q.axis, q.block) and isinstance(q.dynamic, bool)
            zero = q.zero_point.astype(np.float64)
            whole &= bool((zero == 0).all() if q.codes.signed else ((zero >= 0) & (zero <= q.codes.high)).all())
            if not whole or q.scale.shape != q.zero_point.shape or not (np.isfinite(q.scale) & (q.scale > 0)).all():
                raise PlanError(
                    what=f"`{path}` has an unusable scale at `{name}`.",
                    why="scales must be positive, finite float32, with zero-points that are codes, of the same shape.",
                    fix="make the plan again with `dfq-deploy calibrate`.",
                )
        return plan


def shortened(scale: np.ndarray) -> np.ndarray:
    """Scales of blocks (float32) rounded to what float16 can hold, so that files may store them in half the bytes.

    If one of them is so small or so large that it would change by more than 1 in 256, none is rounded.
    """
    short = scale.astype(np.float16).astype(np.float32)
    return short if (np.abs(short - scale) <= scale / 256).all() else scale


def make_plan(
    ranges: Ranges,
    scheme: QuantScheme,
    *,
    attention: bool = False,
    outputs: bool = True,
    spare: Mapping[str, str] | None = None,
    ends: Collection[str] = (),
) -> QuantPlan:
    """The plan that represents `ranges` in the formats of `scheme`.

    Args:
        ranges: What each site saw.
        scheme: The wanted formats.
        attention: Quantize the operands of the attention matmuls too.
        outputs: Quantize the outputs of convolutions too: ONNX Runtime fuses an INT8 convolution only then.
        spare: Layers that stay float, with the reason.
        ends: Layers that get 8 bits whatever the scheme says, if it quantizes them at all.

    Raises:
        PlanError: A range is not finite, or nothing is left to quantize.
    """
    spare = spare or {}
    sites: dict[str, QParams] = {}
    spared: dict[str, str] = {}
    for name, seen in ranges.sites.items():
        codes = _codes(name, seen, scheme)
        reason = spare.get(layer_of(name)) or _unfit(ranges, layer_of(name), scheme)
        if seen.role == "operand" and not attention:
            reason = reason or "attention matmuls stay float unless --attention asks for them"
        if seen.role == "output" and not outputs:
            continue
        if reason:
            spared[name] = reason
        if reason or codes is None:
            continue
        if layer_of(name) in ends:
            codes = CODES["int8" if codes.signed else "uint8"]
        if not (np.isfinite(seen.low) & np.isfinite(seen.high)).all():
            raise PlanError(
                what=f"the range at `{name}` is not finite.",
                why="NaN or Inf passed there.",
                fix="check the checkpoint and the calibration images.",
            )
        scale, zero_point = choose_qparams(seen.low, seen.high, codes)
        scale = scale if seen.block is None else shortened(scale)
        dynamic = scheme.dynamic and seen.role == "input"
        sites[name] = QParams(scale, zero_point, codes, seen.axis, seen.block, dynamic)
    if scheme.weight and not sites:
        raise PlanError(
            what="the plan quantizes nothing.",
            why=next(iter(spared.values()), "the model has no plain Linear or Conv2d."),
            fix="pick another model or --scheme, or spare fewer layers.",
        )
    return QuantPlan(sites, spared, scheme.name, ranges.model, ranges.images)


def _codes(name: str, seen: SiteRange, scheme: QuantScheme) -> Codes | None:
    if seen.role == "weight":
        return scheme.weight
    return scheme.softmax if scheme.softmax and name.endswith(".av.lhs") else scheme.activation


def _unfit(ranges: Ranges, layer: str, scheme: QuantScheme) -> str | None:
    """Why `layer` cannot have the formats of `scheme`, or None."""
    if scheme.weight is None:
        return "the scheme leaves everything in float"
    weight = ranges.sites.get(f"{layer}.weight")
    if weight is None:
        return "an attention matmul has no weight" if scheme.activation is None else None
    unlike = scheme.dynamic or scheme.weight.name != "int8"
    if len(weight.shape) != 2 and unlike and not scheme.simulated:
        return f"{scheme.name} is for matrices: run-times have no such convolution"
    if scheme.blocked and weight.block is None:
        return f"its {weight.shape[1]} input channels are not two or more whole blocks"
    return None


def _facts(qparams: QParams) -> dict[str, Any]:
    """What the header of a plan says of a site."""
    dynamic = {"dynamic": True} if qparams.dynamic else {}
    return {"codes": qparams.codes.name, "axis": qparams.axis, **block_entry(qparams.block), **dynamic}
