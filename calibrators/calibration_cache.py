"""TensorRT's calibration cache: a plan written as one, and one read as ranges, both exact.

TensorRT specifies the format nowhere; what is known of it: a first line `TRT-<version>-<algorithm>`, then one line
`<tensor>: <scale>` per tensor of the network, the scale being max(|low|, |high|) / 127 as the bits of a float32 in
eight hexadecimal digits, highest byte first. Names may hold colons and spaces. Tensors that are not quantized have the
scale `0`. Versions are 8601 for 8.6.1 and 101601 for 10.16.1; TensorRT passes over a cache of another version or
algorithm. Weights are not in it: TensorRT finds their scales itself.

Source: README of NVIDIA's sampleINT8 ("Calibration file"); ONNX Runtime's TensorRT provider, which reads such files;
caches that people posted with NVIDIA/TensorRT issues 2036 and 2958.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from calibrators.affine import CODES
from calibrators.errors import PlanError, RecipeError
from calibrators.files import written_whole
from calibrators.plan import QuantPlan
from calibrators.ranges import Ranges, SiteRange

__all__ = ["ALGORITHMS", "VERSION", "read_cache", "write_cache"]

ALGORITHMS = {"entropy": "EntropyCalibration2", "minmax": "MinMaxCalibration"}
VERSION = "10.16.1"  # the newest TensorRT that calibrates
_HEADER = re.compile(r"TRT-(\d+)-(\w+)")
_VERSION = re.compile(r"(\d+)\.(\d{1,2})\.(\d{1,2})(\.\d+)?")
_LINE = re.compile(r"(.+): ([0-9a-f]{8}|0)")
_TINY = np.finfo(np.float32).tiny
_STEPS = CODES["int8"].high


def write_cache(
    plan: QuantPlan,
    path: Path,
    *,
    tensors: Mapping[str, str] | None = None,
    version: str = VERSION,
    algorithm: str = "entropy",
) -> None:
    """Write the activation scales of `plan`, once per tensor.

    Args:
        plan: A symmetric plan.
        path: Where the cache goes.
        tensors: Tensor of the network by site; without it a tensor is called by its site.
        version: The TensorRT that shall read it.
        algorithm: The calibrator that shall read it: entropy or minmax.

    Raises:
        PlanError: A site is not symmetric INT8 with one scale, or one tensor has two scales.
        RecipeError: There is no such version or algorithm.
    """
    header = _header(version, algorithm)
    lines: dict[str, str] = {}
    for site, qparams in plan.sites.items():
        if site.endswith(".weight"):
            continue
        if qparams.codes.name != "int8" or qparams.scale.ndim or qparams.zero_point.any():
            raise PlanError(
                what=f"the plan cannot be written as a calibration cache: `{site}` is not symmetric INT8 per tensor.",
                why="a line of the cache holds one scale and no zero-point.",
                fix="make the plan with --scheme w8a8.",
            )
        tensor = (tensors or {}).get(site, site)
        line = f"{tensor}: {qparams.scale.view(np.uint32):08x}"
        if lines.setdefault(tensor, line) != line:
            raise PlanError(
                what=f"tensor `{tensor}` has two scales, one of them at `{site}`.",
                why="a cache holds one per tensor, and here each layer that reads it has its own.",
                fix="make the plan with --observer percentile --refine none.",
            )
    if not lines:
        raise PlanError(
            what="the plan cannot be written as a calibration cache: it quantizes no activation.",
            why=f"a cache holds the scales of activations, and {plan.scheme} leaves them in float.",
            fix="make the plan with --scheme w8a8.",
        )
    with written_whole(path) as temporary:
        temporary.write_text("\n".join([header, *lines.values()]) + "\n", encoding="utf-8", newline="")


def read_cache(path: Path, tensors: Mapping[str, str], *, model: str, images: str) -> Ranges:
    """The ranges of activations in the cache `path`, in float64: their plan has the very scales of the cache.

    Args:
        path: The cache.
        tensors: Tensor of the network by activation site; other tensors in the cache are the network's own affair.
        model: Recorded with the ranges: the model's fingerprint.
        images: Likewise, the images'.

    Raises:
        PlanError: The file is missing or damaged, or holds no usable scale for one of `tensors`.
    """
    try:
        header, *lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, ValueError) as cause:
        raise _damaged(path, f"{cause}") from cause
    made_by = _HEADER.fullmatch(header)
    if made_by is None or made_by[2] not in ALGORITHMS.values():
        raise _damaged(path, f"its first line reads `{header[:60]}`, not `TRT-101601-EntropyCalibration2` or the like")
    scales: dict[str, np.float32] = {}
    for number, line in enumerate(lines, start=2):
        read = _LINE.fullmatch(line)
        if read is None:
            raise _damaged(path, f"line {number} reads `{line[:60]}`, not `tensor: 3c010a14` or the like")
        scale = np.uint32(int(read[2], 16)).view(np.float32)
        if read[1] in scales or not 0 <= scale < np.inf:
            raise _damaged(path, f"line {number} gives `{read[1]}` " + ("twice" if read[1] in scales else f"{scale}"))
        scales[read[1]] = scale
    missing = [tensor for tensor in tensors.values() if not scales.get(tensor, 0) >= _TINY]
    if missing:
        raise PlanError(
            what=f"`{path}` has no scale for `{missing[0]}`, and {len(missing) - 1} more tensors of this model.",
            why="it was made for another model, or TensorRT quantized less than the model has sites.",
            fix="calibrate this model's float.onnx with TensorRT, all of it in INT8.",
        )
    seen = {}
    for site, tensor in tensors.items():
        high = np.float64(scales[tensor]) * _STEPS
        seen[site] = SiteRange(np.asarray(-high), np.asarray(high), _role(site), None, ())
    return Ranges(seen, model, images, f"{made_by[2]} of TensorRT {made_by[1]}")


def _header(version: str, algorithm: str) -> str:
    parts = _VERSION.fullmatch(version)
    if parts is None or algorithm not in ALGORITHMS:
        raise RecipeError(
            what=f"there is no calibration cache of TensorRT `{version}` by `{algorithm}`.",
            why=f"versions are numbers like {VERSION}, algorithms {' and '.join(ALGORITHMS)}.",
            fix="pass those of the TensorRT that shall read the cache.",
        )
    major, minor, patch = (int(part) for part in parts.groups()[:3])
    number = major * 1000 + minor * 100 + patch if major < 10 else major * 10000 + minor * 100 + patch
    return f"TRT-{number}-{ALGORITHMS[algorithm]}"


def _role(site: str) -> str:
    ending = site.rpartition(".")[2]
    return "operand" if ending in ("lhs", "rhs") else ending


def _damaged(path: Path, why: str) -> PlanError:
    return PlanError(
        what=f"`{path}` is no whole calibration cache of TensorRT.",
        why=f"{why}.",
        fix="make it again, with TensorRT or with `dfq-deploy convert --to cache`.",
    )
