"""The model with other weights, a student's or from refine passes: a copy, beside the float model that judges all.

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
from safetensors.numpy import save_file
from safetensors.torch import load_file

from calibrators.errors import BundleError
from calibrators.files import fingerprint_of, written_whole
from calibrators.plan import QParams
from dfq_deploy.models import Model

__all__ = ["changed_weights", "copy_of", "load_refined", "load_scales", "save_refined", "save_weights", "with_weights"]

_SCALES = (".scale", ".zero_point")  # endings of the names that are no tensor of the model


def copy_of(model: Model) -> Model:
    """The model with weights of its own."""
    return replace(model, module=copy.deepcopy(model.module))


def changed_weights(model: Model, refined: Model) -> dict[str, np.ndarray]:
    """The tensors in which `refined` differs from `model`, by name."""
    before = model.module.state_dict()
    after = refined.module.state_dict()
    return {name: value.numpy(force=True) for name, value in after.items() if not torch.equal(value, before[name])}


def save_refined(path: Path, model: Model, refined: Model, sites: Mapping[str, QParams] | None = None) -> None:
    """Write the tensors in which `refined` differs from `model`, and the scales and zero-points of `sites`."""
    changed = changed_weights(model, refined)
    for name, qparams in (sites or {}).items():
        changed |= {f"{name}{part}": getattr(qparams, part[1:]) for part in _SCALES}
    save_weights(path, changed)


def save_weights(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Write tensors by name."""
    with written_whole(path) as temporary:
        save_file({name: np.array(value, order="C") for name, value in weights.items()}, temporary)


def load_refined(model: Model, path: Path) -> Model:
    """The model with the weights in the file `path`, and a fingerprint that tells so.

    Raises:
        BundleError: The file is missing or damaged, or belongs to another model.
    """
    tensors = {name: value for name, value in _load(path).items() if not name.endswith(_SCALES)}
    return with_weights(model, tensors, f"`{path}`")


def with_weights(model: Model, weights: Mapping[str, torch.Tensor], source: str) -> Model:
    """The model with these of its tensors replaced, and a fingerprint that tells so.

    Args:
        model: The model.
        weights: Tensors by name.
        source: What holds them, for people.

    Raises:
        BundleError: They are those of another model.
    """
    refined = copy_of(model)
    digest = hashlib.sha256()
    state = refined.module.state_dict()
    for name, value in sorted(weights.items()):
        if name not in state or state[name].shape != value.shape:
            raise BundleError(
                what=f"{source} holds weights of another model.",
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
    except FileNotFoundError as cause:
        raise BundleError(
            what=f"the refined weights in `{path}` are not here, so there is no reference.",
            why="`work` is not deployed: it stays in the folder that the export wrote, and pack leaves it out.",
            fix="run this on that folder or a zip of all of it, or export again; running the engine takes none of it.",
        ) from cause
    except (OSError, SafetensorError) as cause:
        raise BundleError(
            what=f"the refined weights in `{path}` cannot be read.",
            why=f"{type(cause).__name__}: {cause}.",
            fix="copy the file again from where the export ran, or export again.",
        ) from cause
