"""The texts of a Triton model repository: one `config.pbtxt` for each model, in protobuf's text format.

Source: model_config.proto of triton-inference-server/common, which the tests hold each text against.
"""

import json
from collections.abc import Iterator
from typing import Any

from dfq_deploy.serving.options import RepoOptions
from exporters.bundle import Manifest

__all__ = ["LABELS", "engine", "ensemble", "preprocess"]

LABELS = "labels.txt"


def engine(name: str, manifest: Manifest, options: RepoOptions, *, labels: bool, gather: bool) -> str:
    """The model itself; warmed up with one image and with the most that it gets."""
    trt = manifest.backend == "trt"
    gpu = trt or manifest.engine.options.provider == "cuda"
    largest = manifest.engine.options.batch[2]
    parts = [
        f'name: "{name}"',
        f'platform: "{"tensorrt_plan" if trt else "onnxruntime_onnx"}"',
        f"max_batch_size: {largest}",
        _tensor("input", "images", "TYPE_FP32", manifest.preprocess.shape),
        *_outputs(manifest, labels=labels),
        f"instance_group [ {{ count: {options.instances} kind: {'KIND_GPU' if gpu else 'KIND_CPU'} }} ]",
    ]
    if gather:
        parts.append(_batching(options))
    parts += [_warm_up(size, manifest.preprocess.shape) for size in sorted({1, largest})]
    return "\n".join(parts) + "\n"


def preprocess(name: str, manifest: Manifest, options: RepoOptions, *, facts: dict[str, Any]) -> str:
    """The model that turns image files into input, in Python."""
    parts = [
        f'name: "{name}"',
        'backend: "python"',
        f"max_batch_size: {manifest.engine.options.batch[2]}",
        _tensor("input", "encoded", "TYPE_STRING", (1,)),
        _tensor("output", "images", "TYPE_FP32", manifest.preprocess.shape),
        f"instance_group [ {{ count: {options.instances} kind: KIND_CPU }} ]",
        f'parameters {{ key: "preprocess" value {{ string_value: {_quoted(json.dumps(facts))} }} }}',
    ]
    return "\n".join(parts) + "\n"


def ensemble(names: tuple[str, str, str], manifest: Manifest, *, labels: bool) -> str:
    """The model that takes image files and gives what the model puts out, out of the other two."""
    model, before, name = names
    steps = (
        (before, ("encoded", "encoded"), ["images"]),
        (model, ("images", "images"), [output.name for output in manifest.model.outputs]),
    )
    parts = [
        f'name: "{name}"',
        'platform: "ensemble"',
        f"max_batch_size: {manifest.engine.options.batch[2]}",
        _tensor("input", "encoded", "TYPE_STRING", (1,)),
        *_outputs(manifest, labels=labels),
        "ensemble_scheduling {",
        *(_step(*step) for step in steps),
        "}",
    ]
    return "\n".join(parts) + "\n"


def _step(model: str, given: tuple[str, str], found: list[str]) -> str:
    maps = " ".join([_map("input_map", *given), *(_map("output_map", name, name) for name in found)])
    return f'  step [ {{ model_name: "{model}" model_version: -1 {maps} }} ]'


def _map(field: str, key: str, value: str) -> str:
    return f'{field} {{ key: "{key}" value: "{value}" }}'


def _tensor(field: str, name: str, kind: str, dims: tuple[int, ...]) -> str:
    return f'{field} [ {{ name: "{name}" data_type: {kind} dims: {list(dims)} }} ]'


def _outputs(manifest: Manifest, *, labels: bool) -> Iterator[str]:
    named = f' label_filename: "{LABELS}"' if labels else ""
    for output in manifest.model.outputs:
        yield f'output [ {{ name: "{output.name}" data_type: TYPE_FP32 dims: {list(output.shape)}{named} }} ]'


def _batching(options: RepoOptions) -> str:
    delay = f"max_queue_delay_microseconds: {round(1000 * options.delay_ms)}"
    return f"dynamic_batching {{ {delay} default_queue_policy {{ max_queue_size: {options.queue} }} }}"


def _warm_up(size: int, image: tuple[int, ...]) -> str:
    zeros = f'key: "images" value {{ data_type: TYPE_FP32 dims: {list(image)} zero_data: true }}'
    return f'model_warmup [ {{ name: "{size} at once" batch_size: {size} inputs {{ {zeros} }} }} ]'


def _quoted(text: str) -> str:
    """`text` as protobuf's text format has strings; JSON escapes the same two characters the same way."""
    return json.dumps(text, ensure_ascii=False)
