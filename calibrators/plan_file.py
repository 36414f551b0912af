"""The file of a plan or of ranges: tensors of one safetensors file, and a JSON header that nothing in it may belie.

Comes below `plan` and `ranges`, which say what the tensors mean. What a file says is held against its form here, so
that whoever has a plan may trust it.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from calibrators.errors import PlanError
from calibrators.files import written_whole
from calibrators.headers import header_of, later, newer

__all__ = ["block_entry", "check_texts", "is_placed", "load_tensors", "malformed", "save_tensors"]

_FORMAT = 1
_AXES = 32  # the most that a tensor may have
_FIELDS = {
    "dfq_plan": {"format", "scheme", "model", "images", "spared", "sites"},
    "dfq_ranges": {"format", "model", "images", "observer", "sites"},
}
_SITE_FIELDS = {"dfq_plan": {"codes", "axis", "block", "dynamic"}, "dfq_ranges": {"role", "axis", "shape", "block"}}


def save_tensors(path: Path, kind: str, tensors: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
    """Write tensors with a header of the key `kind`, `dfq_plan` or `dfq_ranges`."""
    text = json.dumps({"format": _FORMAT, **header}, separators=(",", ":"))
    with written_whole(path) as temporary:
        save_file({name: np.array(t, order="C") for name, t in tensors.items()}, temporary, {kind: text})


def load_tensors(path: Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and the header that `save_tensors` wrote.

    Raises:
        PlanError: The file is missing, damaged, of another kind or of another format.
    """
    try:
        with safe_open(path, "numpy") as file:
            header = header_of((file.metadata() or {})[kind])
            if why := _newer(header, kind):
                raise later(PlanError, path, why)
            if header["format"] != _FORMAT:
                raise ValueError(header["format"])
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as cause:
        raise malformed(path, cause) from cause


def _newer(header: dict[str, Any], kind: str) -> str | None:
    """What shows that a later version wrote the header, in it or in what it says of a site."""
    sites = header["sites"].values() if isinstance(header.get("sites"), dict) else ()
    found = (newer(site, reads=_FORMAT, known=_SITE_FIELDS[kind]) for site in sites if isinstance(site, dict))
    return newer(header, reads=_FORMAT, known=_FIELDS[kind]) or next((why for why in found if why), None)


def block_entry(size: int | None) -> dict[str, int]:
    """The entry `block` of a site that has blocks, and none of any other."""
    return {} if size is None else {"block": size}


def is_placed(values: np.ndarray, axis: object, block: object) -> bool:
    """Whether values are one for a tensor, or one per index of an axis, or one per block."""
    if not (axis is None or (type(axis) is int and 0 <= axis < _AXES)):
        return False
    if block is not None:
        return type(block) is int and block > 0 and values.ndim == 2
    return values.ndim == (0 if axis is None else 1)


def check_texts(values: Iterable[object]) -> None:
    """Return if all values are strings.

    Raises:
        TypeError: One is not.
    """
    wrong = [value for value in values if not isinstance(value, str)]
    if wrong:
        message = f"{wrong[0]!r} stands where a text should"
        raise TypeError(message)


def malformed(path: Path, cause: Exception) -> PlanError:
    """The error for a file that does not hold what it should."""
    return PlanError(
        what=f"`{path}` is not a whole plan or ranges file of format {_FORMAT}.",
        why=f"{type(cause).__name__}: {cause}.",
        fix="make it again with `dfq-deploy calibrate`.",
    )
