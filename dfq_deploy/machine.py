"""What figures were taken on: the processor, what else it does, this process's memory, versions. No torch."""

import os
import platform
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["installed", "machine", "memory_held", "versions_of", "vnni"]

_PROCESSOR = Path("/proc/cpuinfo")
_STATUS = Path("/proc/self/status")


def machine() -> dict[str, str]:
    """Processor, cores that may be used, and what ran in the minute before (load average)."""
    lines = _PROCESSOR.read_text(encoding="utf-8").splitlines() if _PROCESSOR.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load_average = f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": str(usable),
        "load_average": load_average,
    }


def memory_held() -> tuple[float, float]:
    """MiB that this process holds, and the most that it ever held; 0 where the system does not say (Linux does).

    The resident set, libraries included. `getrusage` would count the memory of whoever started the process.
    """
    if not _STATUS.exists():
        return 0.0, 0.0
    status = _STATUS.read_text(encoding="utf-8")
    now, highest = (re.search(rf"^{key}:\s+(\d+) kB", status, re.MULTILINE) for key in ("VmRSS", "VmHWM"))
    return (int(now[1]) / 1024 if now else 0.0), (int(highest[1]) / 1024 if highest else 0.0)


def vnni() -> list[str] | None:
    """The processor's instructions for INT8 dot products, by name; None where its flags cannot be read."""
    if not _PROCESSOR.exists():
        return None
    return sorted(set(re.findall(r"\w*vnni", _PROCESSOR.read_text(encoding="utf-8"))))


def installed(package: str) -> str | None:
    """The version of a package, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    return {name: found for name in packages if (found := installed(name))}
