"""What is installed, what that enables, and what would go wrong.

Nothing is fixed here: each finding says what was seen and, where it is a problem, what to do.
"""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from calibrators.errors import BackendError
from dfq_deploy.machine import installed, vnni
from dfq_deploy.pitfalls import pitfalls_here, too_old
from exporters.tensorrt import cuda

__all__ = ["Finding", "diagnose"]

_NEEDED = {
    "onnxruntime": "running bundles",
    "torch": "making bundles: pip install 'dfq-deploy[export]'",
    "timm": "making bundles: pip install 'dfq-deploy[export]'",
    "onnxsim": "making bundles: pip install 'dfq-deploy[export]'",
    "fastapi": "dfq-deploy serve: pip install 'dfq-deploy[serve]'",
    "tensorrt": "--backend trt, on the machine that builds: pip install tensorrt; without it engines stay pending",
    "tensorrt-rtx-cu13": "--backend rtx, and to foresee what TensorRT does: pip install 'dfq-deploy[rtx]'",
    "cuda-bindings": "running TensorRT engines: pip install cuda-bindings",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: What.
        state: `ok`, `absent` (and that is fine until it is needed) or `problem`.
        text: What was seen, and what to do about it.
    """

    subject: str
    state: Literal["ok", "absent", "problem"]
    text: str


def diagnose() -> list[Finding]:
    """All findings about this environment."""
    found = [_package(name, use) for name, use in _NEEDED.items()]
    found += [_onnxruntime_clash(), _torchvision_clash(), *_pitfalls()]
    return [*found, _integer_dot_products(), _gpu(), _cuda()]


def _package(name: str, use: str) -> Finding:
    number = installed(name) or (installed("onnxruntime-gpu") if name == "onnxruntime" else None)
    return Finding(name, "ok", number) if number else Finding(name, "absent", f"needed for {use}")


def _onnxruntime_clash() -> Finding:
    """Both wheels write the same folder: whichever came last wins, and removing one breaks the other."""
    subject = "onnxruntime / onnxruntime-gpu"
    cpu, gpu = installed("onnxruntime"), installed("onnxruntime-gpu")
    if cpu and gpu:
        return Finding(
            subject,
            "problem",
            f"both {cpu} and {gpu} are installed and overwrite each other: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then install one of them",
        )
    return Finding(subject, "ok", "one of them" if cpu or gpu else "none")


def _torchvision_clash() -> Finding:
    """A torch for the CPU beside a torchvision for CUDA: the operators of the latter are missing, and timm stops."""
    subject = "torch / torchvision"
    torch, vision = installed("torch"), installed("torchvision")
    if torch and vision and "+cpu" in torch and "+cpu" not in vision:
        return Finding(
            subject,
            "problem",
            f"{torch} and {vision} are of two builds, and timm cannot be imported: install both from one index",
        )
    return Finding(subject, "ok", "of one build" if torch and vision else "not both")


def _pitfalls() -> list[Finding]:
    """Versions with known faults, and those older than what the tests run with."""
    old = [
        Finding(name, "problem", f"{number} is older than the tests run with: pip install '{name}{bound}'")
        for name, (number, bound) in too_old().items()
    ]
    faults = [
        Finding(known.package, "problem" if known.problem else "ok", f"{number} {known.text}")
        for known, number in pitfalls_here()
    ]
    return [*old, *faults]


def _integer_dot_products() -> Finding:
    """ONNX Runtime's INT8 matmuls can saturate on x86 processors that lack VNNI, and are slower there."""
    subject = "INT8 dot products"
    if platform.machine() not in ("x86_64", "AMD64"):
        return Finding(subject, "ok", f"{platform.machine()}: not looked at")
    flags = vnni()
    if flags is None:
        return Finding(subject, "ok", f"{platform.system()}: processor flags cannot be read here")
    if flags:
        return Finding(subject, "ok", ", ".join(flags))
    return Finding(subject, "problem", "no VNNI: INT8 sums may saturate; trust `dfq-deploy check` on this machine only")


def _gpu() -> Finding:
    """The GPU that TensorRT would build for and run on."""
    try:
        gpu = cuda.require()
    except BackendError as error:
        return Finding("GPU", "absent", f"{error.why} Engines of TensorRT for RTX can be built without one")
    return Finding("GPU", "ok", f"{gpu.name}, {gpu.capability}, {gpu.memory / 2**30:.0f} GiB")


def _cuda() -> Finding:
    """Whether --provider cuda can be tried; ONNX Runtime's own list says yes without a driver, so it is not asked."""
    gpu, driver = installed("onnxruntime-gpu"), Path("/proc/driver/nvidia/version").exists()
    if gpu and driver:
        return Finding("CUDA", "ok", f"onnxruntime-gpu {gpu} and an NVIDIA driver")
    lacks = " and ".join(name for name, there in (("onnxruntime-gpu", gpu), ("an NVIDIA driver", driver)) if not there)
    return Finding("CUDA", "absent", f"--provider cuda lacks {lacks}; the CPU needs neither")
