"""Known faults of other packages, by the versions that have them, for `doctor`; each was seen with such a version.

What this tool works around by itself is a remark, what a person has to do something about a problem.
"""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dfq_deploy.machine import installed

__all__ = ["Pitfall", "pitfalls_here", "too_old"]


@dataclass(frozen=True)
class Pitfall:
    """A fault of some versions of a package.

    Attributes:
        package: Its name.
        versions: Those that have the fault.
        text: What goes wrong, and what to do.
        problem: Whether it is for a person to do something.
    """

    package: str
    versions: str
    text: str
    problem: bool = False


_EXTRAS = ("export", "ray", "rtx", "score", "serve", "sign", "transformers")
_PITFALLS = (
    Pitfall(
        "onnxruntime",
        ">=1.27,<1.32",
        "does not load symmetric INT8 with a quantized convolution at opset 21: exports are opset 20, and so should "
        "be what other tools make",
    ),
    Pitfall(
        "onnxruntime-gpu",
        ">=1.22",
        "has no INT8 kernels for CUDA: what is quantized runs on that provider as a simulation, no faster than float",
    ),
    Pitfall(
        "tensorrt",
        ">=11",
        "has no INT8 calibrators any more: --collector trt takes TensorRT 10; plans and engines need none",
    ),
    Pitfall(
        "tensorrt-rtx-cu13",
        "<1.7.1",
        "refuses INT8 convolutions: pip install 'tensorrt-rtx-cu13>=1.7.1', or spare the patch embedding",
        problem=True,
    ),
    Pitfall(
        "nvidia-modelopt",
        ">=0",
        "pins older versions of onnx and onnxruntime-gpu: keep it in an environment of its own",
        problem=True,
    ),
)


def pitfalls_here() -> list[tuple[Pitfall, str]]:
    """The faults that what is installed has, each with the version."""
    found = [(pitfall, installed(pitfall.package)) for pitfall in _PITFALLS]
    return [
        (pitfall, number)
        for pitfall, number in found
        if number and SpecifierSet(pitfall.versions).contains(number, prereleases=True)
    ]


def too_old() -> dict[str, tuple[str, str]]:
    """The packages that are installed in a version older than this tool is tested with: it, and what is needed.

    An extra that was never installed as such leaves pip nothing to hold its packages to.
    """
    try:
        wanted = [one for line in requires("dfq-deploy") or () if _runs(one := Requirement(line))]
    except PackageNotFoundError:  # run from its source folder
        return {}
    found = {one.name: (number, str(one.specifier)) for one in wanted if (number := installed(one.name))}
    return {
        name: (number, bound)
        for name, (number, bound) in found.items()
        if not SpecifierSet(bound).contains(number, prereleases=True)
    }


def _runs(wanted: Requirement) -> bool:
    """Whether it is for running this tool, with or without extras, not for developing it."""
    return wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in _EXTRAS)
