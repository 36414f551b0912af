"""How long each layer of an ONNX model takes in ONNX Runtime, from the profile that its sessions write.

Models are called in turn, so that whatever else the machine does falls on all of them.
"""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from exporters.ort_engine import cannot_load

__all__ = ["SERIAL_SUFFIX", "profile_layers"]

SERIAL_SUFFIX = re.compile(r"_token_\d+$")  # what ONNX Runtime appends when it renames a fused node
_CALLS = 20
_WARM_UP = 3
_KERNEL = "_kernel_time"


def profile_layers(
    models: Sequence[Path], layers: Iterable[str], options: Sequence[onnxruntime.SessionOptions]
) -> list[dict[str, float]]:
    """Per model the milliseconds that each layer takes in a call with one image, its Q/DQ included; "" is the rest.

    On the CPU: of a GPU's kernels a profile has the launches.

    Args:
        models: ONNX files whose nodes are named by layer.
        layers: The names.
        options: A session's options for each model; profiling is switched on in them.

    Raises:
        BackendError: ONNX Runtime cannot load a model.
    """
    with tempfile.TemporaryDirectory() as folder:
        sessions = []
        for index, (model, chosen) in enumerate(zip(models, options, strict=True)):
            chosen.enable_profiling = True
            chosen.profile_file_prefix = str(Path(folder) / str(index))
            try:
                sessions.append(onnxruntime.InferenceSession(str(model), chosen, providers=["CPUExecutionProvider"]))
            except Exception as cause:  # ONNX Runtime's own errors have no common base class
                raise cannot_load(model, cause) from cause
        if not sessions:
            return []
        (images,) = sessions[0].get_inputs()
        pixels = np.random.default_rng(0).normal(size=(1, *images.shape[1:])).astype(np.float32)
        for _ in range(_WARM_UP + _CALLS):
            for session in sessions:
                session.run(None, {images.name: pixels})
        profiles = [json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")) for session in sessions]
    names = sorted(layers, key=len, reverse=True)
    return [_by_layer(profile, names) for profile in profiles]


def _by_layer(profile: list[dict[str, Any]], layers: list[str]) -> dict[str, float]:
    """Medians of the nodes' times, summed by layer."""
    times = defaultdict(list)
    for event in profile:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            times[event["name"].removesuffix(_KERNEL)].append(event["dur"])
    found = dict.fromkeys([*layers, ""], 0.0)  # microseconds
    for node, durations in times.items():
        plain = SERIAL_SUFFIX.sub("", node)
        layer = next((layer for layer in layers if plain == layer or plain.startswith(f"{layer}.")), "")
        found[layer] += float(np.median(durations[_WARM_UP:]))
    return {layer: round(time / 1000, 4) for layer, time in found.items()}
