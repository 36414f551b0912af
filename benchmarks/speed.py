"""How fast: `make bench`. Ratios within one run, as JSON; needs no download.

1. One PSAQ step for DeiT-T at batch 32, fast form against exact form.
2. ONNX Runtime INT8 against float, same process, calls taken in turn, median of the ratios pair by pair.
3. INT4 weights as `dfq_deploy.load` runs them, unpacked, against float, the same way.
4. ONNX Runtime's session options, one changed at a time, for the INT8 engine of ViT-B.
5. `dfq-deploy --help` against a Python that does nothing, calls taken in turn, median of the ratios.

Weights are random: speed does not depend on their values.
"""

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import dfq_deploy as dfq
from calibrators.registry import pick
from dfq_deploy.generation import GenerateOptions
from dfq_deploy.machine import machine, versions_of, vnni
from dfq_deploy.models.loading import load_model
from exporters.turns import median_ratio, seconds_in_turn

IMAGES = 32
CALLS = 30
WARM_UP = 5
_OPTIONS: tuple[tuple[int, str, Any], ...] = (
    (1, "session.disable_prepacking", "1"),
    (1, "enable_cpu_mem_arena", False),
    (1, "enable_mem_pattern", False),
    (1, "session.set_denormal_as_zero", "1"),
    (2, "session.intra_op.allow_spinning", "0"),
)


class _EnoughError(Exception):
    """Raised out of a generator when enough steps have been timed."""


def seconds_per_step(*, exact: bool, steps: int) -> float:
    """Median time from one forward pass to the next in PSAQ-ViT V1 for DeiT-T, 32 images, after one step to warm up."""
    model = load_model("deit_t", random_weights=True)
    psaq = pick("dfq_deploy.generation.generators", "psaq_v1")
    marks: list[float] = []

    def mark(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) == IMAGES:  # not the probe that looks at shapes
            marks.append(time.perf_counter())
        if len(marks) == steps + 2:
            raise _EnoughError

    model.module.register_forward_pre_hook(mark)
    with contextlib.suppress(_EnoughError):
        psaq.generate(model, GenerateOptions(count=IMAGES, seed=0, exact=exact))
    return float(np.median(np.diff(marks)[1:]))


def against_float(model: str, bundle: Path, scheme: str, batch: int) -> dict[str, float]:
    """Milliseconds per call of `float.onnx` and of the bundle, one thread, and the median of the former over the other.

    INT8 is run as the plain file that anyone can run, INT4 as `dfq_deploy.load` runs it.
    """
    images = np.random.default_rng(0).normal(size=(batch, 3, 224, 224)).astype(np.float32)
    feed = {"images": images}
    calls: list[Callable[[], object]] = [partial(_session(bundle / "float.onnx").run, None, feed)]
    if scheme == "w8a8":
        calls.append(partial(_session(bundle / "model.onnx").run, None, feed))
    else:
        calls.append(partial(dfq.load(bundle, threads=1), images))
    times = seconds_in_turn(calls, rounds=CALLS, warm_up=WARM_UP)
    medians = 1000 * np.median(times, axis=0)
    ratio, *_ = median_ratio(times[:, 0], times[:, 1])
    print(f"{model} batch {batch}: float {medians[0]:.1f} ms, {scheme} {medians[1]:.1f} ms, {ratio:.2f}x", flush=True)
    return {"float_ms": float(medians[0]), f"{scheme}_ms": float(medians[1]), f"float_over_{scheme}": ratio}


def _session(path: Path, threads: int = 1, **changed: Any) -> onnxruntime.InferenceSession:
    """A session with `changed` attributes of its options, and entries of its configuration where a name has a dot."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    for name, value in changed.items():
        if "." in name:
            options.add_session_config_entry(name, value)
        else:
            setattr(options, name, value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def session_options(engine: Path) -> dict[str, float]:
    """By what is changed in the options of a session, the median of the plain one's time over its own, at batch 1."""
    feed = {"images": np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)}
    found = {}
    for threads, name, value in _OPTIONS:
        sessions = _session(engine, threads), _session(engine, threads, **{name: value})
        times = seconds_in_turn([partial(one.run, None, feed) for one in sessions], rounds=CALLS, warm_up=WARM_UP)
        ratio, low, high = median_ratio(times[:, 0], times[:, 1])
        found[f"{threads} threads, {name} {value}"] = ratio
        print(f"{threads} threads, {name} {value}: {ratio:.3f}x ({low:.3f} to {high:.3f})", flush=True)
    return found


def help_against_python() -> dict[str, float]:
    """Seconds of `dfq-deploy --help` and of a Python that does nothing, and the median ratio of the two."""
    command = str(Path(sys.executable).with_name("dfq-deploy"))
    runs = ([command, "--help"], [sys.executable, "-c", "pass"])
    calls = [partial(subprocess.run, run, check=True, stdout=subprocess.DEVNULL) for run in runs]
    times = seconds_in_turn(calls, rounds=CALLS, warm_up=WARM_UP)
    medians = np.median(times, axis=0)
    ratio, *_ = median_ratio(times[:, 0], times[:, 1])
    print(f"--help {medians[0]:.2f} s, python {medians[1]:.2f} s, {ratio:.1f}x", flush=True)
    return {"help_s": float(medians[0]), "python_s": float(medians[1]), "help_over_python": ratio}


def machine_facts() -> dict[str, str]:
    """What the figures were taken on."""
    return {**machine(), "vnni": str(bool(vnni())), **versions_of(("torch", "timm", "onnxruntime"))}


def main() -> None:
    """Run all and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    out: Path = parser.parse_args().out
    torch.manual_seed(0)
    fast, exact = seconds_per_step(exact=False, steps=10), seconds_per_step(exact=True, steps=2)
    print(f"PSAQ step, DeiT-T, batch 32: fast {fast:.2f} s, exact {exact:.2f} s, {exact / fast:.1f}x", flush=True)
    result: dict[str, Any] = {
        "machine": machine_facts(),
        "help": help_against_python(),
        "psaq_step": {"fast_s": fast, "exact_s": exact, "exact_over_fast": exact / fast},
    }
    with tempfile.TemporaryDirectory() as folder:
        for model, scheme in itertools.product(("deit_t", "vit_b"), ("w8a8", "w4a16")):
            bundle = Path(folder) / f"{model}-{scheme}"
            asked = {"scheme": scheme, "generator": "noise", "count": 4, "keep_float": True}
            dfq.export(dfq.Recipe(model=model, random_weights=True, **asked), bundle, limit=1)
            sizes = {name: (bundle / f"{name}.onnx").stat().st_size / 2**20 for name in ("float", "model")}
            print(f"{model} {scheme}: {sizes['model']:.1f} MiB, float {sizes['float']:.1f} MiB", flush=True)
            figures = {f"batch_{n}": against_float(model, bundle, scheme, n) for n in (1, 8)}
            result[f"{model} {scheme}"] = {**figures, "MiB": sizes}
        result["session options, vit_b w8a8"] = session_options(Path(folder) / "vit_b-w8a8" / "model.onnx")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
