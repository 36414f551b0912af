"""Ranges: what each site saw, out of which a plan is made.

Kept as a safetensors file, a JSON header beside the ends of each range. No torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibrators.plan_file import block_entry, check_texts, is_placed, load_tensors, malformed, save_tensors

__all__ = ["Ranges", "SiteRange"]


@dataclass(frozen=True)
class SiteRange:
    """What one site saw.

    Attributes:
        low: Lower bound: a scalar, (n,) along `axis`, or (n, K / block) for blocks of a matrix's K columns. float32, or
            float64 where it stands for a scale that float32 bounds could not give back.
        high: Upper bound, of the same shape.
        role: What passes: `input`, `weight`, `output` or `operand`.
        axis: The axis with a range per index, or None.
        shape: A sample's shape, without the batch; a weight's whole shape.
        block: Columns per block, or None.
    """

    low: np.ndarray
    high: np.ndarray
    role: str
    axis: int | None
    shape: tuple[int, ...]
    block: int | None = None


@dataclass(frozen=True)
class Ranges:
    """Ranges by site name, with what they were seen on.

    Attributes:
        sites: One range per site that the model used.
        model: Fingerprint of the model's name and weights.
        images: Fingerprint of the calibration images.
        observer: How they were observed, for people.
    """

    sites: Mapping[str, SiteRange]
    model: str
    images: str
    observer: str

    def save(self, path: Path) -> None:
        """Write `<site>.low` and `<site>.high` tensors and a JSON header."""
        tensors = {f"{name}.{end}": getattr(r, end) for name, r in self.sites.items() for end in ("low", "high")}
        sites = {
            n: {"role": r.role, "axis": r.axis, "shape": list(r.shape), **block_entry(r.block)}
            for n, r in self.sites.items()
        }
        facts = {"model": self.model, "images": self.images, "observer": self.observer}
        save_tensors(path, "dfq_ranges", tensors, {**facts, "sites": sites})

    @classmethod
    def load(cls, path: Path) -> "Ranges":
        """The ranges in the file `path`.

        Raises:
            PlanError: The file is missing, damaged or of another format.
        """
        tensors, header = load_tensors(path, "dfq_ranges")
        try:
            sites = {
                name: SiteRange(
                    tensors[f"{name}.low"],
                    tensors[f"{name}.high"],
                    s["role"],
                    s["axis"],
                    tuple(s["shape"]),
                    s.get("block"),
                )
                for name, s in header["sites"].items()
            }
            ranges = cls(sites, header["model"], header["images"], header["observer"])
            check_texts([ranges.model, ranges.images, ranges.observer, *(r.role for r in sites.values())])
            for name, r in sites.items():
                sized = all(isinstance(size, int) and size >= 0 for size in r.shape)
                floats = {r.low.dtype, r.high.dtype} <= {np.dtype(np.float32), np.dtype(np.float64)}
                if not (sized and floats and r.low.shape == r.high.shape and is_placed(r.low, r.axis, r.block)):
                    raise TypeError(name)
        except (AttributeError, KeyError, TypeError) as cause:
            raise malformed(path, cause) from cause
        return ranges
