"""The model with the weights that refine passes gave it: a copy, beside the float model that everything is judged by.

Its changed tensors are one safetensors file. The scales that the corrections settled lie in the same file.
"""

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from calibrators.errors import BundleError
from calibrators.files import fingerprint_of, written_whole
from calibrators.plan import QParams
from dfq_deploy.models import Model

__all__ = ["copy_of", "load_refined", "load_scales", "save_refined"]

_SCALES = (".scale", ".zero_point")  # endings of the names that are no tensor of the model


def copy_of(model: Model) -> Model:
    """The model with weights of its own."""
    return replace(model, module=copy.deepcopy(model.module))


def save_refined(path: Path, model: Model, refined: Model, sites: Mapping[str, QParams] | None = None) -> None:
    """Write the tensors in which `refined` differs from `model`, and the scales and zero-points of `sites`."""
    before = model.module.state_dict()
    changed = {k: v.contiguous() for k, v in refined.module.state_dict().items() if not torch.equal(v, before[k])}
    for name, qparams in (sites or {}).items():
        changed |= {f"{name}{part}": torch.from_numpy(np.array(getattr(qparams, part[1:]))) for part in _SCALES}
    with written_whole(path) as temporary:
        save_file(changed, temporary)


def load_refined(model: Model, path: Path) -> Model:
    """The model with the weights in the file `path`, and a fingerprint that tells so.

    Raises:
        BundleError: The file is missing or damaged, or belongs to another model.
    """
    refined = copy_of(model)
    tensors = {name: value for name, value in _load(path).items() if not name.endswith(_SCALES)}
    digest = hashlib.sha256()
    state = refined.module.state_dict()
    for name, value in sorted(tensors.items()):
        if name not in state or state[name].shape != value.shape:
            raise BundleError(
                what=f"`{path}` holds weights of another model.",
                why=f"`{model.name}` has no tensor `{name}` of shape {tuple(value.shape)}.",
                fix="export again.",
            )
        state[name].copy_(value)
        digest.update(name.encode() + value.numpy().tobytes())
    return replace(refined, fingerprint=fingerprint_of([model.fingerprint, digest.hexdigest()]))


def load_scales(path: Path, sites: Mapping[str, QParams]) -> dict[str, QParams]:
    """`sites` with the scales and zero-points in the file `path`."""
    tensors = {name: value.numpy() for name, value in _load(path).items()}
    found = dict(sites)
    for name, qparams in sites.items():
        if f"{name}.scale" in tensors:
            scale, zero = (tensors[f"{name}{part}"] for part in _SCALES)
            found[name] = replace(qparams, scale=scale, zero_point=zero)
    return found


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as cause:
        raise BundleError(
            what=f"the refined weights in `{path}` cannot be read.",
            why=f"{type(cause).__name__}: {cause}.",
            fix="export again; without them there is no reference to compare with.",
        ) from cause
