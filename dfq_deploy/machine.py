"""What figures were taken on: the processor, what else it does, and the versions of what is installed. No torch."""

import os
import platform
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["installed", "machine", "versions_of", "vnni"]

_PROCESSOR = Path("/proc/cpuinfo")


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
