"""How long a call takes on the GPU: float, INT8 and INT4 engines of one model at batch 1, 8 and 32.

Run it on the machine with the GPU: `python benchmarks/latency.py --backend trt --out runs/latency.json`. A call is what
a user makes, numpy in and numpy out, so both copies are in it. Engines take turns call by call, so that whatever the
clocks do they do to all. Weights are random: speed does not depend on their values. It needs no download.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import dfq_deploy as dfq
from calibrators.errors import BackendError
from dfq_deploy.machine import versions_of
from exporters.tensorrt import cuda
from exporters.turns import seconds_in_turn

BATCHES = (1, 8, 32)
CALLS = 200
WARM_UP = 20
FORMATS = {"float": "float", "int8": "w8a8", "int4": "w4a16"}  # column and scheme
_PACKAGES = ("tensorrt", "tensorrt_rtx", "onnxruntime-gpu", "cuda-bindings", "torch", "timm")
_FACTS = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.limit")


def gpu() -> dict[str, str]:
    """What nvidia-smi says of the GPU that CUDA uses first, clocks as they are at this moment."""
    which = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    asked = ["nvidia-smi", f"--id={which}", f"--query-gpu={','.join(_FACTS)}", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    return dict(zip(_FACTS, (fact.strip() for fact in answer.strip().split(",")), strict=True))


def milliseconds(runners: list[dfq.Runner], images: np.ndarray) -> np.ndarray:
    """Time of each call of each runner, (calls, runners), after a warm-up."""
    calls = [partial(runner, images) for runner in runners]
    return 1000 * seconds_in_turn(calls, rounds=CALLS, warm_up=WARM_UP)


def measure(folders: dict[str, Path]) -> dict[str, Any]:
    """By batch and format: median, 10th and 90th percentile in ms, and median of float time over this time."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        runners = [stack.enter_context(dfq.load(folder)) for folder in folders.values()]
        shape = runners[0].manifest.preprocess.shape
        for batch in BATCHES:
            images = np.random.default_rng(0).normal(size=(batch, *shape)).astype(np.float32)
            times = milliseconds(runners, images)
            found[f"batch_{batch}"] = {"gpu": gpu()} | {
                name: {
                    **dict(zip(("p10_ms", "median_ms", "p90_ms"), np.percentile(own, (10, 50, 90)), strict=True)),
                    "float_over_this": float(np.median(times[:, 0] / own)),
                }
                for name, own in zip(folders, times.T, strict=True)
            }
    return found


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [f"| batch | {' | '.join(f'{name}, ms' for name in FORMATS)} |", "|---" * (1 + len(FORMATS)) + "|"]
    for batch in BATCHES:
        cells = [found[f"batch_{batch}"][name] for name in FORMATS]
        texts = [
            f"{c['median_ms']:.3f} ({c['p10_ms']:.3f} to {c['p90_ms']:.3f}), {c['float_over_this']:.2f}x" for c in cells
        ]
        lines.append(f"| {batch} | {' | '.join(texts)} |")
    return "\n".join(lines)


def main() -> None:
    """Export the engines, time them, write the JSON and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("trt", "rtx"), default="trt")
    parser.add_argument("--model", default="vit_b")
    parser.add_argument("--body", choices=("fp32", "fp16", "bf16"), default="fp16", help="what is not quantized")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    chosen = parser.parse_args()
    try:
        cuda.require()
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(3)
    with tempfile.TemporaryDirectory() as folder:
        folders = {name: Path(folder) / name for name in FORMATS}
        for name, scheme in FORMATS.items():
            recipe = dfq.Recipe(
                model=chosen.model,
                random_weights=True,
                generator="noise",
                count=4,
                backend=chosen.backend,
                scheme=scheme,
                float=chosen.body,
                batch=",".join(map(str, BATCHES)),
            )
            dfq.export(recipe, folders[name], limit=1)
        found = measure(folders)
    result = {"backend": chosen.backend, "model": chosen.model, "body": chosen.body, "calls": CALLS}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps({**result, "versions": versions_of(_PACKAGES), **found}, indent=1))
    facts = gpu()
    print(f"{facts['name']}, driver {facts['driver_version']}; {chosen.model}, {chosen.body}, {chosen.backend}\n")
    print(table(found))
    print(f"\nmedian (10th to 90th percentile) of {CALLS} calls; written to {chosen.out}")


if __name__ == "__main__":
    main()
