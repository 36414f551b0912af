"""What every tool of the comparison shares: its order from the command line, and what is measured while it works.

Each tool runs as a process of its own, in an environment of its own, with nothing but numpy in common. It gets a float
ONNX file and images, writes a quantized ONNX file, and leaves beside it how long that took and how much memory.
"""

import argparse
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Job:
    """One order.

    Attributes:
        float_onnx: The float model, its input `images` (N, C, H, W) float32 with N free.
        name: What dfq-deploy calls this model.
        checkpoint: The float model's weights, for tools that start from PyTorch.
        images: Calibration images (N, C, H, W) float32 as .npy, or an ImageSet file; None where the tool gets none.
        option: Which of its methods the tool is to use.
        out: The ONNX file to write.
    """

    float_onnx: Path
    name: str
    checkpoint: Path
    images: Path | None
    option: str
    out: Path

    def batches(self) -> list[dict[str, np.ndarray]]:
        """The images one by one, by input name; they stay in their file until they are read."""
        assert self.images is not None
        pixels = np.load(self.images, mmap_mode="r")
        return [{"images": pixels[i : i + 1]} for i in range(len(pixels))]


@dataclass(frozen=True)
class Moment:
    """Two clocks, in seconds: the wall's, and that of all processor time of this process and its children."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> "Moment":
        """Both clocks as they stand."""
        return cls(time.perf_counter(), sum(os.times()[:4]))


def measure(quantize: Callable[[Job], Moment | None], packages: Sequence[str]) -> None:
    """Carry out the order on the command line and write its time, peak memory and versions to `--facts`.

    Args:
        quantize: Writes `job.out`; returns when that was done, where it goes on with what does not count.
        packages: Whose versions to record.
    """
    parser = argparse.ArgumentParser()
    for field in ("float-onnx", "checkpoint", "images", "out", "facts"):
        parser.add_argument(f"--{field}", type=Path)
    parser.add_argument("--name")
    parser.add_argument("--option", default="")
    order = vars(parser.parse_args())
    facts = order.pop("facts")
    job = Job(**order)
    before = Moment.now()
    after = quantize(job) or Moment.now()
    # The kernel's high-water mark of this process; getrusage's would count the memory of whoever started it.
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    found = {
        "seconds": after.wall - before.wall,
        "cpu_seconds": after.cpu - before.cpu,
        "peak_mib": int(peak) / 1024,
        "versions": {name: version(name) for name in packages},
    }
    facts.write_text(json.dumps(found, indent=1))
